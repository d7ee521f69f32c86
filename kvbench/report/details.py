"""Everything beside the accuracy: intervals, paired differences to fp16, rates, KL, storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

from kvbench.report.board import SETTING_COLUMNS, Block, Leaderboard
from kvbench.report.cells import Cell, Comparison
from kvbench.report.header import header
from kvbench.report.paper import label, paper_table
from kvbench.report.table2 import bits, percent_number, score
from kvbench.report.text import (
    MISSING,
    amount,
    csv_text,
    estimate,
    markdown_table,
    number,
    p_value,
    percent,
    percent_range,
    several,
)

MEAN = "mean"
"""Stands for the task in lines that average over tasks."""

NOTES = """\
KL(fp16 || method) in nats, teacher-forced on fp16's own answer: at the first answer token, and the
mean over its tokens; averaged per sample first, with the standard error over samples. Agreement:
same answer text as fp16. Accuracy with its 95 % interval: Wilson's for a task, bootstrap for the
mean. Strict: only an answer that is exactly one option counts. Difference to fp16 on the same
samples, in points, with its paired bootstrap interval. Lost/gained: samples that became wrong, that
became right. p: exact McNemar, two-sided. Detectable: the smallest difference that this many
samples with this many flips show with 80 % power at the 5 % level (Connor, Biometrics 43, 1987)."""

_HEADERS = (
    "Method", "Task", "Bits", "Cache bytes", "KL first", "KL mean", "Agreement", "Accuracy", "n",
    "Strict", "Difference", "Lost/gained", "p", "Detectable", "Empty", "Unparsable", "OOM",
    "Errors", "Packed tokens read", "Batch", "Storage", "Flags",
)  # fmt: skip

_CSV_HEADERS = (
    "method", "task", "n", "expected", "accuracy", "accuracy_low", "accuracy_high", "strict",
    "empty", "unparsable", "oom", "errors", "not_read", "paired_n", "difference",
    "difference_low", "difference_high", "lost", "gained", "flips", "mcnemar_p", "detectable",
    "agreement", "kl_first", "kl_first_se", "kl_mean", "kl_mean_se", "bits_per_element",
    "cache_bytes", "packed_tokens_read", "batch", "storage", "flags",
)  # fmt: skip


def details_markdown(board: Leaderboard) -> str:
    """Return ``details.md``."""
    parts = ["# Details"]
    for block in board.blocks:
        lines = [_line(method, task, cell) for method, task, cell in _cells(block)]
        parts += [header(block, board), markdown_table(_HEADERS, lines, texts=2)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def details_csv(board: Leaderboard) -> str:
    """Return ``details.csv``: a line a cell; shares and differences in percent, KL in nats."""
    lines = [
        [*astuple(block.setting), method, task, *_csv_values(cell)]
        for block in board.blocks
        for method, task, cell in _cells(block)
    ]
    return csv_text([*SETTING_COLUMNS, *_CSV_HEADERS], lines)


def flags(cell: Cell) -> str:
    """Return what is wrong with a cell, in words; empty where nothing is."""
    found = []
    if cell.mixed:
        found.append("mixed prompts, images or calibrations")
    if cell.not_read:
        found.append(f"cache not read: {cell.not_read}")
    if not cell.complete:
        found.append(f"{cell.n} of {cell.expected} samples")
    return "; ".join(found)


def _cells(block: Block) -> Iterator[tuple[str, str, Cell]]:
    for method in block.methods:
        for task in block.tasks:
            if (method, task) in block.cells:
                yield method, task, block.cells[method, task]
        yield method, MEAN, block.overall[method]


def _line(method: str, task: str, cell: Cell) -> list[str]:
    paper = paper_table()
    accuracy = score(cell)
    if cell.accuracy is not None and cell.interval is not None:
        accuracy = percent_range(cell.accuracy, cell.interval)
    return [
        label(paper.methods, method),
        label(paper.tasks, task),
        bits(cell),
        amount(cell.cache_bytes),
        estimate(cell.kl_first),
        estimate(cell.kl_mean),
        percent(cell.agreement),
        accuracy,
        str(cell.n),
        percent(cell.strict),
        *_difference(cell.comparison),
        percent(cell.empty),
        percent(cell.unparsable),
        str(cell.oom),
        str(cell.errors),
        amount(cell.tokens_read),
        several(cell.batches),
        several(cell.storages),
        flags(cell) or MISSING,
    ]


def _difference(found: Comparison | None) -> list[str]:
    if found is None:
        return [MISSING] * 4
    return [
        percent_range(found.difference, found.interval, sign="+"),
        f"{found.counts.lost}/{found.counts.gained}",
        p_value(found.p),
        percent(found.detectable),
    ]


def _csv_values(cell: Cell) -> list[str]:
    return [
        str(cell.n),
        str(cell.expected),
        percent_number(cell.accuracy),
        percent_number(cell.interval.low if cell.interval else None),
        percent_number(cell.interval.high if cell.interval else None),
        percent_number(cell.strict),
        percent_number(cell.empty),
        percent_number(cell.unparsable),
        str(cell.oom),
        str(cell.errors),
        str(cell.not_read),
        *_csv_difference(cell.comparison),
        percent_number(cell.agreement),
        number(cell.kl_first.mean if cell.kl_first else None),
        number(cell.kl_first.standard_error if cell.kl_first else None),
        number(cell.kl_mean.mean if cell.kl_mean else None),
        number(cell.kl_mean.standard_error if cell.kl_mean else None),
        number(cell.bits),
        number(cell.cache_bytes),
        number(cell.tokens_read),
        several(cell.batches),
        several(cell.storages),
        flags(cell),
    ]


def _csv_difference(found: Comparison | None) -> list[str]:
    if found is None:
        return [""] * 9
    return [
        str(found.counts.n),
        percent_number(found.difference),
        percent_number(found.interval.low),
        percent_number(found.interval.high),
        str(found.counts.lost),
        str(found.counts.gained),
        percent_number(found.counts.flips),
        number(found.p),
        percent_number(found.detectable),
    ]
