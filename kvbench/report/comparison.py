"""The paper's Table II beside what was measured here, for the models and data that it has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass

from kvbench.report.board import SETTING_COLUMNS, Block, Leaderboard
from kvbench.report.header import header
from kvbench.report.paper import label, paper_table
from kvbench.report.text import MISSING, csv_text, markdown_table, number

DATASET = "milebench"

NOTES = """\
Accuracy in percent; difference: here less paper, in points. `*`: the paper's value looks like a
copy error and is not compared. `(n=...)`: fewer samples than the task should have. Mean: over the
tasks that are compared. The paper states neither its protocol nor its prompt template, how it fed
several images, or how it scored empty answers. Its answers to single samples aren't known, so
nothing can be paired: with 200 samples a task each side has a standard error of up to 3.5 points,
and differences below about 7 points mean little."""

_CSV_HEADERS = (
    "method",
    "task",
    "n",
    "expected",
    "paper",
    "here",
    "difference",
    "comparable",
    "note",
)


@dataclass(frozen=True)
class Compared:
    """One cell of both tables, in percent."""

    method: str
    task: str
    n: int
    expected: int
    paper: float
    here: float | None
    suspect: str
    """Why the paper's value is not to be compared with; empty if it is."""

    @property
    def difference(self) -> float | None:
        """Here less paper, in points; None where either says nothing."""
        return None if self.here is None or self.suspect else self.here - self.paper


def comparable(board: Leaderboard) -> list[Block]:
    """Return the blocks that the paper has numbers for: its models, on MileBench."""
    models = paper_table().models
    return [
        block
        for block in board.blocks
        if block.setting.model in models and block.setting.dataset.partition("-")[0] == DATASET
    ]


def paper_markdown(board: Leaderboard) -> str:
    """Return ``paper.md``: three lines a method: the paper's, here, the difference."""
    parts = ["# Beside the paper's Table II"]
    for block in comparable(board):
        headers, lines = _grid(block)
        parts += [header(block, board), markdown_table(headers, lines, texts=2)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def paper_csv(board: Leaderboard) -> str:
    """Return ``paper.csv``: a line a cell."""
    lines = [
        [*astuple(block.setting), *_csv_values(cell)]
        for block in comparable(board)
        for cell in compared(block)
    ]
    return csv_text([*SETTING_COLUMNS, *_CSV_HEADERS], lines)


def compared(block: Block) -> Iterator[Compared]:
    """Yield the cells of a block that the paper has too, methods at their default parameters."""
    paper = paper_table()
    for method in block.methods:
        for task in block.tasks:
            key, cell = (block.setting.model, method, task), block.cells.get((method, task))
            if key in paper.values and cell is not None:
                here = None if cell.accuracy is None else 100 * cell.accuracy
                reason = paper.suspect.get(key, "")
                yield Compared(method, task, cell.n, cell.expected, paper.values[key], here, reason)


def _grid(block: Block) -> tuple[list[str], list[list[str]]]:
    paper = paper_table()
    cells = {(cell.method, cell.task): cell for cell in compared(block)}
    tasks = [task for task in block.tasks if task in paper.tasks]
    lines = []
    for method in block.methods:
        found = [cells.get((method, task)) for task in tasks]
        if any(found):
            lines += _lines(label(paper.methods, method), found)
    return ["Method", "", *(label(paper.tasks, task) for task in tasks), "Mean"], lines


def _lines(method: str, cells: list[Compared | None]) -> list[list[str]]:
    usable = [cell for cell in cells if cell is not None and cell.difference is not None]
    return [
        [method, "paper", *map(_paper, cells), _mean([cell.paper for cell in usable])],
        ["", "here", *map(_here, cells), _mean([cell.here or 0.0 for cell in usable])],
        [
            "",
            "difference",
            *map(_delta, cells),
            _mean([cell.difference or 0.0 for cell in usable], "+"),
        ],
    ]


def _paper(cell: Compared | None) -> str:
    return MISSING if cell is None else f"{cell.paper:.1f}{'*' if cell.suspect else ''}"


def _here(cell: Compared | None) -> str:
    if cell is None or cell.here is None:
        return MISSING
    return f"{cell.here:.1f}" + ("" if cell.n >= cell.expected else f" (n={cell.n})")


def _delta(cell: Compared | None) -> str:
    if cell is None or cell.difference is None:
        return "*" if cell is not None and cell.suspect else MISSING
    return f"{round(cell.difference, 1) + 0.0:+.1f}"


def _mean(values: list[float], sign: str = "") -> str:
    if not values:
        return MISSING
    return f"{round(math.fsum(values) / len(values), 1) + 0.0:{sign}.1f}"


def _csv_values(cell: Compared) -> list[str]:
    return [
        cell.method,
        cell.task,
        str(cell.n),
        str(cell.expected),
        number(cell.paper),
        number(cell.here),
        number(cell.difference),
        "no" if cell.suspect else "yes",
        cell.suspect,
    ]
