"""What stands above a table: which numbers these are, and how to get them again."""

from __future__ import annotations

from kvbench.report.board import Block, Leaderboard
from kvbench.report.paper import label, paper_table
from kvbench.report.text import MISSING, code, escape, several

PROTOCOLS = {
    "quantized_prefill": "every prompt token attends to the cache as stored",
    "exact_prefill": "exact attention within the prompt; the cache is quantized before the last "
    "prompt token, so all answer tokens read it as stored",
    "sparse_prefill": "only the tokens that a method finds important attend within the prompt, "
    "exactly and to each other; answer tokens read the cache as stored",
}


def title(block: Block) -> str:
    """Return the block's title as plain text: model and protocol."""
    model = block.setting.model
    name = label(paper_table().models, model)
    shown = name if name == model else f"{name} ({model})"
    return f"{shown}, {block.setting.protocol}"


def header(block: Block, board: Leaderboard) -> str:
    """Return the block's heading and settings in Markdown."""
    setting = block.setting
    facts = {
        "protocol": f"{setting.protocol}: {PROTOCOLS[setting.protocol]}",
        "data": f"{setting.dataset}; samples a task: {_samples(block)}",
        "model": f"{setting.model}, revision {setting.revision or MISSING}, {setting.dtype}",
        "prompt": setting.prompt_style,
        "batch": several(block.batches),
        "kvbench": setting.version,
    }
    lines = [f"## {escape(title(block))}", ""]
    lines += [f"- {name}: {escape(text)}" for name, text in facts.items()]
    lines.append(f"- generation: {code(setting.generation)}")
    if board.machine:
        lines.append(f"- machine: {escape(board.machine)}")
    if board.command:
        lines.append(f"- command: {code(board.command)}")
    return "\n".join(lines)


def _samples(block: Block) -> str:
    counts = block.samples
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
