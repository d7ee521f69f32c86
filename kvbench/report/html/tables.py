"""The page's tables: what stands in each cell, and the number that it is sorted by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbench.report.board import Block
from kvbench.report.cells import Cell
from kvbench.report.details import MEAN, flags
from kvbench.report.efficiency_tables import BASIS, LARGEST, MAIN
from kvbench.report.paper import label, paper_table
from kvbench.report.table2 import bits, mean_score, score
from kvbench.report.text import MISSING, amount, estimate, p_value, percent, percent_range, several

if TYPE_CHECKING:
    from kvbench.report.efficiency import EfficiencyBlock

_SIGNS = " %\N{GREATER-THAN OR EQUAL TO}\N{LESS-THAN OR EQUAL TO}\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Column:
    """A column's title; `task` if it is one task's."""

    title: str
    numeric: bool = True
    task: str = ""


@dataclass(frozen=True)
class Entry:
    """A cell's text, and the number it is sorted by (None: by its text, or nothing to sort)."""

    text: str
    value: float | None = None
    change: str = ""
    """``lower`` or ``higher`` where the interval of the difference to fp16 leaves out 0."""


@dataclass(frozen=True)
class Line:
    """A line; of one method, and of one task or their mean or neither."""

    method: str
    entries: Sequence[Entry]
    task: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each of its columns."""

    caption: str
    columns: Sequence[Column]
    lines: Sequence[Line]


def leaderboard(block: Block, caption: str) -> Table:
    """Methods by tasks, with the mean, bits and bytes."""
    paper = paper_table()
    tasks = [Column(label(paper.tasks, task), task=task) for task in block.tasks]
    columns = [
        *(Column("Method", numeric=False), Column("Bits"), *tasks),
        *(Column("Mean", task=MEAN), Column("Cache bytes")),
    ]
    return Table(caption, columns, [_ranked(block, method) for method in block.methods])


def differences(block: Block, caption: str) -> Table:
    """Accuracy and difference to fp16 of every method and task, with intervals."""
    titles = (
        "Accuracy", "Difference to FP16", "Lost/gained", "p", "Agreement", "KL first", "KL mean",
        "n",
    )  # fmt: skip
    return Table(caption, _columns(titles), _lines(block, _difference, "Mean"))


def failures(block: Block, caption: str) -> Table:
    """What kept answers from counting, and answers that say nothing, by method and task."""
    titles = (
        "Samples", "Scored", "Missing", "Out of memory", "Errors", "Cache not read", "Empty %",
        "Unparsable %", "Strictly right %", "Flags",
    )  # fmt: skip
    return Table(caption, _columns(titles), _lines(block, _failure, "all"))


def efficiency(block: EfficiencyBlock, caption: str) -> Table:
    """Batch, memory and speed, as in ``table4.md``: the largest batch, then those asked for."""
    shown = (*BASIS, *MAIN, *LARGEST)
    columns = [Column("Method", numeric=False)]
    columns += [
        Column(title, numeric=place >= len(BASIS)) for place, (title, _) in enumerate(shown)
    ]
    lines = []
    for entry in block.entries:
        texts = [show(entry) for _, show in shown]
        entries = [Entry(entry.name), *(Entry(text, _number(text)) for text in texts)]
        lines.append(Line(entry.name, entries))
    return Table(caption, columns, lines)


def settings(blocks: Sequence[tuple[str, Block]]) -> Table:
    """What the numbers of each table share; blocks with their names."""
    titles = (
        *("Model revision", "Weights and activations", "Samples a task", "Prompt style"),
        *("Generation", "Generated together", "Storage", "kvbench"),
    )
    lines = []
    for name, block in blocks:
        setting = block.setting
        storages = {s for cell in block.overall.values() for s in cell.storages}
        values = (
            *(setting.revision or MISSING, setting.dtype, several(block.samples)),
            *(setting.prompt_style, setting.generation, several(block.batches)),
            *(several(sorted(storages)), setting.version),
        )
        lines.append(Line("", [Entry(name), *(Entry(value) for value in values)]))
    columns = [Column(title, numeric=False) for title in ("Table", *titles)]
    return Table("What each table's numbers share", columns, lines)


def _columns(titles: Sequence[str]) -> list[Column]:
    return [Column("Method", False), Column("Task", False), *(Column(title) for title in titles)]


def _lines(block: Block, show: Callable[[Cell], list[Entry]], together: str) -> list[Line]:
    paper = paper_table()
    lines = []
    for method in block.methods:
        cells = {
            task: block.cells[method, task] for task in block.tasks if (method, task) in block.cells
        }
        for task, cell in {**cells, MEAN: block.overall[method]}.items():
            name = label(paper.methods, method)
            task_label = together if task == MEAN else label(paper.tasks, task)
            lines.append(Line(name, [Entry(name), Entry(task_label), *show(cell)], task))
    return lines


def _ranked(block: Block, method: str) -> Line:
    overall = block.overall[method]
    name = label(paper_table().methods, method)
    cells = [block.cells.get((method, task)) for task in block.tasks]
    mean = Entry(mean_score(block, method), overall.accuracy, _change(overall))
    scores = [
        Entry(score(cell), cell.accuracy if cell else None, _change(cell) if cell else "")
        for cell in cells
    ]
    size = Entry(amount(overall.cache_bytes), overall.cache_bytes)
    return Line(name, [Entry(name), Entry(bits(overall), overall.bits), *scores, mean, size])


def _change(cell: Cell) -> str:
    if cell.comparison is None:
        return ""
    interval = cell.comparison.interval
    return "lower" if interval.high < 0 else "higher" if interval.low > 0 else ""


def _difference(cell: Cell) -> list[Entry]:
    found = cell.comparison
    accuracy = score(cell)
    if cell.accuracy is not None and cell.interval is not None:
        accuracy = percent_range(cell.accuracy, cell.interval)
    compared = [Entry(MISSING)] * 3
    if found is not None:
        shown = percent_range(found.difference, found.interval, sign="+")
        counts = f"{found.counts.lost}/{found.counts.gained}"
        compared = [
            Entry(shown, found.difference, _change(cell)),
            Entry(counts, found.counts.lost),
            Entry(p_value(found.p), found.p),
        ]
    return [
        Entry(accuracy, cell.accuracy),
        *compared,
        Entry(percent(cell.agreement), cell.agreement),
        Entry(estimate(cell.kl_first), cell.kl_first.mean if cell.kl_first else None),
        Entry(estimate(cell.kl_mean), cell.kl_mean.mean if cell.kl_mean else None),
        Entry(str(cell.n), cell.n),
    ]


def _failure(cell: Cell) -> list[Entry]:
    missing = max(0, cell.expected - cell.n - cell.oom - cell.errors - cell.not_read)
    counts = (cell.expected, cell.n, missing, cell.oom, cell.errors, cell.not_read)
    shares = (cell.empty, cell.unparsable, cell.strict)
    return [
        *(Entry(str(count), count) for count in counts),
        *(Entry(percent(share), share) for share in shares),
        Entry(flags(cell) or MISSING),
    ]


def _number(text: str) -> float | None:
    """The number that a cell shows, whatever sign or unit is beside it."""
    try:
        return float(text.strip(_SIGNS).replace(",", ""))
    except ValueError:
        return None
