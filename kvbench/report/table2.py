"""The leaderboard in the form of the paper's Table II: methods by tasks, bits and bytes beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import SETTING_COLUMNS, Block, Leaderboard, build
from kvbench.report.cells import Cell
from kvbench.report.header import header
from kvbench.report.paper import label, paper_table, rank
from kvbench.report.text import MISSING, amount, csv_text, markdown_table, number, percent, several

NOTES = """\
Accuracy in percent. Bits: stored bits per cached element, metadata included. Cache bytes: mean over
samples, exact; only for packed storage. Mean: every task weighing the same; only the tasks of the
paper's Table II where there are any. `(n=...)`: fewer scored samples than the task should have.
`not read`: the answers came without reading the quantized cache, so they say nothing about it.
`mixed`: one sample was asked with different prompts or images, or the method ran with different
calibrations. Intervals, paired differences and KL stand in `details.md`."""


def leaderboard_markdown(rows: Iterable[SampleRow], run: Mapping[str, Any] | None = None) -> str:
    """Return the leaderboard of result rows as Markdown, a table for each model and protocol.

    Args:
        rows: Result rows, in any order.
        run: Content of ``run.json``, for the command line and the planned samples.
    """
    return table2_markdown(build(rows, run))


def table2_markdown(board: Leaderboard) -> str:
    """Return ``table2.md``."""
    parts = ["# Leaderboard"]
    for block in board.blocks:
        headers, lines = grid(block)
        parts += [header(block, board), markdown_table(headers, lines, texts=1)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def grid(block: Block) -> tuple[list[str], list[list[str]]]:
    """Return a block's column titles and cells as plain text."""
    paper = paper_table()
    titles = [label(paper.tasks, task) for task in block.tasks]
    lines = [
        [
            label(paper.methods, method),
            bits(block.overall[method]),
            *(score(block.cells.get((method, task))) for task in block.tasks),
            mean_score(block, method),
            amount(block.overall[method].cache_bytes),
        ]
        for method in block.methods
    ]
    return ["Method", "Bits", *titles, "Mean", "Cache bytes"], lines


def score(cell: Cell | None) -> str:
    """Return a cell's accuracy in percent, or why there is none."""
    if cell is None:
        return MISSING
    if cell.accuracy is None:
        return failure(cell)
    return percent(cell.accuracy) + ("" if cell.complete else f" (n={cell.n})")


def failure(cell: Cell) -> str:
    """Return in a word why a cell has no score."""
    reasons = {"mixed": cell.mixed, "not read": cell.not_read, "OOM": cell.oom}
    reasons["error"] = cell.errors
    return next((word for word, applies in reasons.items() if applies), MISSING)


def mean_score(block: Block, method: str) -> str:
    """Return the mean over tasks in percent; what is missing from it is said beside it."""
    cell = block.overall[method]
    cells = [block.cells.get((method, task)) for task in block.averaged]
    scored = sum(item is not None and item.n > 0 for item in cells)
    if cell.accuracy is None or scored == len(cells):
        return score(cell)
    return f"{percent(cell.accuracy)} ({scored} of {len(cells)} tasks)"


def bits(cell: Cell) -> str:
    """Return bits per element with two decimals."""
    return MISSING if cell.bits is None else f"{cell.bits:.2f}"


def table2_csv(board: Leaderboard) -> str:
    """Return ``table2.csv``: a line for each block and method, accuracies in percent.

    ``incomplete`` lists tasks with fewer scored samples than expected, with both numbers.
    """
    tasks = sorted(
        {task for block in board.blocks for task in block.tasks},
        key=lambda task: rank(paper_table().tasks, task),
    )
    measures = ("bits_per_element", "cache_bytes", "batch", "storage")
    headers = [*SETTING_COLUMNS, "method", *measures, *tasks, "mean", "incomplete"]
    lines = [_csv_line(block, method, tasks) for block in board.blocks for method in block.methods]
    return csv_text(headers, lines)


def _csv_line(block: Block, method: str, tasks: Iterable[str]) -> list[str]:
    overall = block.overall[method]
    cells = {task: block.cells.get((method, task)) for task in tasks}
    return [
        *astuple(block.setting),
        method,
        number(overall.bits),
        number(overall.cache_bytes),
        several(overall.batches),
        several(overall.storages),
        *(percent_number(cell.accuracy if cell else None) for cell in cells.values()),
        percent_number(overall.accuracy),
        _incomplete(block, method),
    ]


def percent_number(share: float | None) -> str:
    """Return a share in percent for CSV."""
    return number(None if share is None else 100 * share)


def _incomplete(block: Block, method: str) -> str:
    cells = {task: block.cells.get((method, task)) for task in block.tasks}
    return "; ".join(
        f"{task} {cell.n}/{cell.expected}" if cell else f"{task} 0"
        for task, cell in cells.items()
        if cell is None or not cell.complete
    )
