"""Sweeps over methods' fields as tables and plots, from result rows and the sweeps' own file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.defaults import REFERENCE
from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.statistics import CONFIDENCE
from kvbench.report.board import Block, Leaderboard, build
from kvbench.report.cells import Cell
from kvbench.report.documents import read_document
from kvbench.report.figures import figure, files, legend_below, line_style
from kvbench.report.text import (
    MISSING,
    code,
    csv_text,
    escape,
    estimate,
    markdown_table,
    number,
    p_value,
    percent,
    percent_range,
)
from kvbench.report.write import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SweepBlock:
    """One sweep on one model under one protocol."""

    name: str
    title: str
    field: str | None
    points: Mapping[str, str]
    """Labels to methods, the 16-bit cache first."""
    tasks: tuple[str, ...]
    block: Block

    @property
    def file_name(self) -> str:
        """Of its figure."""
        setting = self.block.setting
        return f"{self.name}_{setting.model}_{setting.protocol}"

    def cell(self, label: str, task: str) -> Cell:
        """A point's result on a task; without samples where it has none."""
        return self.block.cells.get((self.points[label], task), Cell(0, 0, 0))


def write_ablation(directory: Path) -> list[Path]:
    """Write ``ablation.md|csv`` and a figure for each sweep, model and protocol.

    Returns:
        The files written.

    Raises:
        UserError: the folder has no rows or no sweeps, or can't be written to.
    """
    known = read_document(directory / "sweeps.json", "ablate")
    board = build(*read_results(directory))
    found = list(_sweeps(known, board))
    if not found:
        raise UserError(f"{directory} has no rows of its sweeps: run kvbench ablate again")
    write_atomically(directory / "ablation.md", _markdown(found, board))
    write_atomically(directory / "ablation.csv", _csv(found))
    drawn = [_draw(sweep, directory) for sweep in found]
    return [directory / "ablation.md", directory / "ablation.csv", *files(drawn)]


def ablation_summary(directory: Path) -> str:
    """All tables as Markdown text.

    Raises:
        UserError: as `write_ablation`.
    """
    known = read_document(directory / "sweeps.json", "ablate")
    sweeps = _sweeps(known, build(*read_results(directory)))
    return "\n\n".join(f"{_title(sweep)}\n{_table(sweep)}" for sweep in sweeps)


def _sweeps(known: Mapping[str, dict[str, Any]], board: Leaderboard) -> Iterator[SweepBlock]:
    for name, sweep in known.items():
        points = {"FP16": REFERENCE} | {p["label"]: p["method"] for p in sweep["points"]}
        for block in board.blocks:
            tasks = tuple(task for task in sweep["tasks"] if task in block.tasks)
            if tasks:
                yield SweepBlock(name, sweep["title"], sweep["field"], points, tasks, block)


def _title(sweep: SweepBlock) -> str:
    setting = sweep.block.setting
    return f"{sweep.title}; {setting.model} on {setting.dataset}, {setting.protocol}"


def _table(sweep: SweepBlock) -> str:
    headers = [sweep.field or "Method"]
    for task in sweep.tasks:
        name = task.upper()
        headers += [name, f"{name} - FP16", "p", f"{name} bits", f"{name} KL"]
        headers += [] if sweep.field else [f"{name} step"]
    lines = [[label, *_line_of(sweep, label)] for label in sweep.points]
    return markdown_table(headers, lines, 1)


def _line_of(sweep: SweepBlock, label: str) -> list[str]:
    """A point's cells of all tasks; steps also say what they change to the line above."""
    labels = list(sweep.points)
    above = labels[max(labels.index(label) - 1, 0)]
    line = []
    for task in sweep.tasks:
        cell, before = sweep.cell(label, task), sweep.cell(above, task).accuracy
        line += _cells(cell)
        if sweep.field is None:
            line.append(_step(cell, None if above == label else before))
    return line


def _step(cell: Cell, before: float | None) -> str:
    if cell.accuracy is None or before is None:
        return MISSING
    return percent(cell.accuracy - before, "+")


def _cells(cell: Cell) -> list[str]:
    accuracy = MISSING
    if cell.accuracy is not None and cell.interval is not None:
        accuracy = percent_range(cell.accuracy, cell.interval)
    if not cell.complete or not cell.n:
        accuracy += f" (n={cell.n})"
    against = cell.comparison
    difference = percent_range(against.difference, against.interval, "+") if against else MISSING
    p = p_value(against.p) if against else MISSING
    bits = MISSING if cell.bits is None else f"{cell.bits:.2f}"
    return [accuracy, difference, p, bits, estimate(cell.kl_mean)]


def _markdown(sweeps: list[SweepBlock], board: Leaderboard) -> str:
    command, machine = code(board.command or MISSING), board.machine or MISSING
    head = (
        f"# Ablations\n\nMade by {command} on {machine}.\n\n"
        "Accuracy in percent with Wilson's interval; difference to FP16 on the same samples with "
        f"its bootstrap interval, and McNemar's p; intervals of {CONFIDENCE:.0%}. KL is the mean "
        "over the answers' tokens, in nats. A step is the change to the line above.\n"
    )
    parts = [f"## {escape(_title(sweep))}\n\n{_table(sweep)}\n" for sweep in sweeps]
    return "\n".join([head, *parts])


def _csv(sweeps: list[SweepBlock]) -> str:
    headers = ["sweep", "model", "protocol", "dataset", "task", "point", "method", "n"]
    headers += ["accuracy", "low", "high", "difference", "difference_low", "difference_high", "p"]
    headers += ["bits", "cache_bytes", "kl_mean"]
    lines = []
    for sweep in sweeps:
        setting = sweep.block.setting
        for task in sweep.tasks:
            for label, method in sweep.points.items():
                place = [sweep.name, setting.model, setting.protocol, setting.dataset, task]
                lines.append([*place, label, method, *_numbers(sweep.cell(label, task))])
    return csv_text(headers, lines)


def _numbers(cell: Cell) -> list[str]:
    interval, against = cell.interval, cell.comparison
    values = [
        float(cell.n),
        cell.accuracy,
        interval.low if interval else None,
        interval.high if interval else None,
        against.difference if against else None,
        against.interval.low if against else None,
        against.interval.high if against else None,
        against.p if against else None,
        cell.bits,
        cell.cache_bytes,
        cell.kl_mean.mean if cell.kl_mean else None,
    ]
    return [number(value) for value in values]


def _draw(sweep: SweepBlock, directory: Path) -> Path:
    """Accuracy along the sweep with intervals, a line for each task; the 16-bit cache dashed."""
    path = directory / sweep.file_name
    labels = [label for label in sweep.points if label != "FP16"]
    places = _places(labels)
    with figure(path, size=(6.4, 4.0)) as (whole, [axis]):
        for index, task in enumerate(sweep.tasks):
            _line(axis, sweep, task, places, index)
        axis.set_xticks(list(places.values()), labels)
        unit = f"{sweep.title}" if sweep.field else "components, added one after the other"
        axis.set(xlabel=unit, ylabel="accuracy (%)")
        legend_below(whole, axis)
    return path


def _places(labels: list[str]) -> dict[str, float]:
    """Where points stand: numbers on a true scale, all else one after the other."""
    try:
        return {label: float(label) for label in labels}
    except ValueError:
        return {label: float(index) for index, label in enumerate(labels)}


def _line(axis: Axes, sweep: SweepBlock, task: str, places: Mapping[str, float], at: int) -> None:
    found = {
        label: (100 * cell.accuracy, 100 * cell.interval.low, 100 * cell.interval.high)
        for label in sweep.points
        if (cell := sweep.cell(label, task)).accuracy is not None and cell.interval is not None
    }
    style = line_style(at)
    points = [(places[label], *values) for label, values in found.items() if label in places]
    if points:
        x, y, low, high = np.array(points).T
        name = task.upper()
        axis.errorbar(x, y, yerr=(y - low, high - y), capsize=3, label=name, **style)
    if "FP16" in found:
        text = f"{task.upper()}, FP16"
        axis.axhline(found["FP16"][0], color=style["color"], linestyle="--", label=text)
