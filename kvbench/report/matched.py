"""Methods at the same stored bits as tables and a figure, from rows and what was matched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.statistics import CONFIDENCE, Interval
from kvbench.report.board import SETTING_COLUMNS, Block, build
from kvbench.report.cells import BASELINE, Cell
from kvbench.report.figures import figure, files, legend_below, line_style
from kvbench.report.header import header, title
from kvbench.report.paper import label, paper_table
from kvbench.report.table2 import bits, mean_score, percent_number, score
from kvbench.report.text import (
    MISSING,
    amount,
    csv_text,
    escape,
    estimate,
    markdown_table,
    number,
    p_value,
    percent_range,
)
from kvbench.report.write import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATCHED = "matched.json"
_LEGEND = 24
"""Characters of a method in the legend."""
NOTES = f"""\
Each method is set so that it stores the most bits an element that don't exceed the budget, with
metadata, windows and exact tokens. "Measured" are its bits on the prompts that the setting was
chosen with, "Bits" those of all samples. Best first. Accuracy in percent, every task weighing the
same, with its {CONFIDENCE:.0%} bootstrap interval; difference to FP16 on the same samples; p:
McNemar; KL(fp16 || method) in nats over the answers' tokens."""


@dataclass(frozen=True)
class Match:
    """The settings of one model for one budget."""

    model: str
    budget: float
    points: Sequence[dict[str, Any]]
    """`name`, `method` and measured `bits` of each setting."""
    absent: dict[str, str]
    """Methods without such a setting, and why."""


def write_matched(directory: Path) -> list[Path]:
    """Write ``matched.md|csv`` and a figure for each model and protocol.

    Returns:
        The files written.

    Raises:
        UserError: the folder has no rows or no settings, or can't be written to.
    """
    found, board = read_matched(directory), build(*read_results(directory))
    parts = ["# Methods at matched bits", NOTES]
    lines, drawn = [], []
    for block in board.blocks:
        mine = [match for match in found if match.model == block.setting.model]
        parts.append(header(block, board))
        parts += [f"### {match.budget:g} bits\n\n{_table(match, block)}" for match in mine]
        lines += [line for match in mine for line in _csv_lines(match, block)]
        drawn.append(_draw(mine, block, directory))
    texts = {"matched.md": "\n\n".join(parts) + "\n", "matched.csv": csv_text(_CSV, lines)}
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [*(directory / name for name in texts), *files(drawn)]


def matched_summary(directory: Path) -> str:
    """All tables as text.

    Raises:
        UserError: as `write_matched`.
    """
    found, board = read_matched(directory), build(*read_results(directory))
    return "\n\n".join(
        f"{title(block)}, {match.budget:g} bits\n\n{_table(match, block)}"
        for block in board.blocks
        for match in found
        if match.model == block.setting.model
    )


def matched_plan(directory: Path) -> str:
    """The settings alone, and how another verb takes them.

    Raises:
        UserError: the folder has no settings.
    """
    parts = []
    for match in read_matched(directory):
        lines = [
            [p["name"].partition("[")[0], p["method"], f"{p['bits']:.3f}"] for p in match.points
        ]
        table = markdown_table(["Method", "Setting", "Measured"], lines, 2)
        specs = ",".join(str(point["method"]) for point in match.points)
        take = [f'--methods "{specs}"'] if specs else []
        parts += [f"{match.model}, {match.budget:g} bits", table, *_absent(match), *take]
    return "\n\n".join(parts)


def read_matched(directory: Path) -> list[Match]:
    """What `kvbench match` found.

    Raises:
        UserError: there is nothing to read.
    """
    path = directory / MATCHED
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["matches"]
        return [Match(**each) for each in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"can't read {path} ({error}): run kvbench match again") from error


def _ranked(match: Match, block: Block) -> Iterator[tuple[str, str, float | None, Cell]]:
    """Name, setting, measured bits and result: the 16-bit cache, then the best first."""
    nothing = Cell(0, 0, 0)
    yield BASELINE, "", None, block.overall.get(BASELINE, nothing)
    rows = [
        (str(p["name"]), str(p["method"]), p["bits"], block.overall.get(p["method"], nothing))
        for p in match.points
    ]
    yield from sorted(rows, key=lambda row: (-(row[3].accuracy or -1.0), row[1]))


def _table(match: Match, block: Block) -> str:
    headers = ["Method", "Setting", "Measured", "Bits", "Mean", "Interval", "- FP16", "p", "KL"]
    lines = [
        [
            label(paper_table().methods, name.partition("[")[0]),
            spec.partition("[")[2].removesuffix("]") or MISSING,
            MISSING if found is None else f"{found:.2f}",
            bits(cell),
            mean_score(block, spec or BASELINE) if cell.n else score(cell),
            *_company(cell),
            amount(cell.cache_bytes),
        ]
        for name, spec, found, cell in _ranked(match, block)
    ]
    table = markdown_table([*headers, "Cache bytes"], lines, 2)
    return "\n\n".join([table, *map(escape, _absent(match))])


def _company(cell: Cell) -> list[str]:
    """Interval, difference, p and KL."""
    interval = MISSING
    if cell.accuracy is not None and cell.interval is not None:
        interval = percent_range(cell.accuracy, cell.interval).partition(" ")[2]
    against = cell.comparison
    difference = percent_range(against.difference, against.interval, "+") if against else MISSING
    return [
        interval,
        difference,
        p_value(against.p) if against else MISSING,
        estimate(cell.kl_mean),
    ]


def _absent(match: Match) -> list[str]:
    reasons = (f"{name} ({reason})" for name, reason in match.absent.items())
    return [f"Not at this size: {'; '.join(reasons)}."] if match.absent else []


_CSV = (
    *SETTING_COLUMNS, "budget", "name", "method", "measured_bits", "bits_per_element",
    "cache_bytes", "n", "accuracy", "accuracy_low", "accuracy_high", "difference",
    "difference_low", "difference_high", "mcnemar_p", "kl_mean", "kl_mean_se", "absent",
)  # fmt: skip


def _csv_lines(match: Match, block: Block) -> Iterator[list[str]]:
    place = [*(str(getattr(block.setting, name)) for name in SETTING_COLUMNS), f"{match.budget:g}"]
    for name, spec, found, cell in _ranked(match, block):
        against, interval, kl = cell.comparison, cell.interval, cell.kl_mean
        shares: list[float | None] = [cell.accuracy, *_ends(interval)]
        shares += [against.difference, *_ends(against.interval)] if against else [None] * 3
        yield [
            *place,
            name,
            spec or BASELINE,
            *map(number, (found, cell.bits, cell.cache_bytes)),
            str(cell.n),
            *map(percent_number, shares),
            number(against.p if against else None),
            *map(number, (kl.mean, kl.standard_error) if kl else (None, None)),
            "",
        ]
    for name, reason in match.absent.items():
        yield [*place, name, *[""] * (len(_CSV) - len(place) - 2), reason]


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (interval.low, interval.high) if interval else (None, None)


def _draw(matches: Sequence[Match], block: Block, directory: Path) -> Path:
    """Accuracy by stored bits, a line for each method; the 16-bit cache dashed."""
    setting = block.setting
    path = directory / f"matched_{setting.model}_{setting.protocol}_{setting.dataset}"
    with figure(path, size=(6.4, 4.8)) as (whole, [axis]):
        names = dict.fromkeys(str(p["name"]) for match in matches for p in match.points)
        for index, name in enumerate(names):
            _line(axis, matches, block, name, index)
        exact = block.overall.get(BASELINE)
        if exact is not None and exact.accuracy is not None:
            axis.axhline(100 * exact.accuracy, color="black", linestyle="--", label="FP16")
        axis.set(xlabel="stored bits an element", ylabel="mean accuracy (%)")
        if axis.get_legend_handles_labels()[0]:
            legend_below(whole, axis, columns=3)
    return path


def _line(axis: Axes, matches: Sequence[Match], block: Block, name: str, index: int) -> None:
    points = []
    for match in matches:
        for point in match.points:
            cell = block.overall.get(point["method"])
            if point["name"] == name and cell is not None and cell.accuracy is not None:
                points.append((cell.bits or point["bits"], 100 * cell.accuracy))
    if points:
        x, y = zip(*sorted(points), strict=True)
        shown = name if len(name) <= _LEGEND else f"{name[:_LEGEND]}…"
        axis.plot(x, y, label=shown, **line_style(index))
