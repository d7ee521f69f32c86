"""Methods at the same stored bits as tables and a figure, from rows and what was matched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.defaults import REFERENCE
from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.store import SAMPLES
from kvbench.report.figures import figure, files, legend_below, line_style
from kvbench.report.matched_results import Results
from kvbench.report.matched_tasks import task_results
from kvbench.report.matched_text import text_results
from kvbench.report.paper import label, paper_table
from kvbench.report.text import MISSING, csv_text, escape, markdown_table, number
from kvbench.report.write import PERPLEXITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATCHED = "matched.json"
_LEGEND = 24
"""Characters of a method in the legend."""
_NOTES = """\
Each method is set so that it stores the most bits an element that don't exceed the budget, with
metadata, windows and exact tokens. "Measured" are its bits on what the setting was chosen with. A
method that stored more in the run, as its later layers saw other states, is not of this size."""
OVER = 0.03
"""By so much of the budget a setting may exceed it in the run and still stand in its table."""
_READERS = {SAMPLES: task_results, PERPLEXITY: text_results}


@dataclass(frozen=True)
class Match:
    """The settings of one model for one budget."""

    model: str
    budget: float
    points: Sequence[dict[str, Any]]
    """`name`, `method` and measured `bits` of each setting."""
    absent: dict[str, str]
    """Methods without such a setting, and why."""
    conditions: dict[str, str | int] = field(default_factory=dict)
    """Where these bits hold, as fields of the results' own."""

    def suits(self, results: Results) -> bool:
        """Whether the settings were found for such results."""
        wanted = {"model": self.model, **self.conditions}
        return wanted.items() <= results.conditions.items()


def write_matched(directory: Path) -> list[Path]:
    """Write ``matched.md|csv`` and a figure for each model and protocol.

    Returns:
        The files written.

    Raises:
        UserError: the folder has no rows or no settings, or can't be written to.
    """
    found, lines, drawn = _read(directory), [], []
    parts = ["# Methods at matched bits", f"{_NOTES}\n\n{found[0][0].notes}"]
    for results, mine in found:
        parts.append(results.header)
        parts += [f"### {match.budget:g} bits\n\n{_table(match, results)}" for match in mine]
        lines += [line for match in mine for line in _csv_lines(match, results)]
        drawn.append(_draw(mine, results, directory))
    texts = {
        "matched.md": "\n\n".join(parts) + "\n",
        "matched.csv": csv_text(_csv_headers(found[0][0]), lines),
    }
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [*(directory / name for name in texts), *files(drawn)]


def matched_summary(directory: Path) -> str:
    """All tables as text.

    Raises:
        UserError: as `write_matched`.
    """
    return "\n\n".join(
        f"{results.title}, {match.budget:g} bits\n\n{_table(match, results)}"
        for results, mine in _read(directory)
        for match in mine
    )


def matched_plan(directory: Path) -> str:
    """The settings alone, and how another verb takes them.

    Raises:
        UserError: the folder has no settings.
    """
    parts = []
    for match in read_matched(directory)[0]:
        lines = [
            [p["name"].partition("[")[0], p["method"], f"{p['bits']:.3f}"] for p in match.points
        ]
        table = markdown_table(["Method", "Setting", "Measured"], lines, 2)
        specs = ",".join(str(point["method"]) for point in match.points)
        take = [f'--methods "{specs}"'] if specs else []
        parts += [f"{match.model}, {match.budget:g} bits", table, *_absent(match.absent), *take]
    return "\n\n".join(parts)


def read_matched(directory: Path) -> tuple[list[Match], str]:
    """Settings that were found, and the name of the rows' file that they were found for.

    Raises:
        UserError: there is nothing to read.
    """
    path = directory / MATCHED
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return [Match(**each) for each in document["matches"]], document.get("rows", SAMPLES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"can't read {path} ({error}): match again") from error


def _read(directory: Path) -> list[tuple[Results, list[Match]]]:
    """Results with the settings found for them, if there are any."""
    matches, rows = read_matched(directory)
    if rows not in _READERS:
        raise UserError(f"{directory / MATCHED} is for {rows}, which is unknown: match again")
    every = _READERS[rows](directory)
    found = [(each, [match for match in matches if match.suits(each)]) for each in every]
    found = [(results, mine) for results, mine in found if mine]
    if not found:
        raise UserError(f"{directory / rows} has no rows of what {MATCHED} says: match again")
    return found


def _ranked(match: Match, results: Results) -> Iterator[tuple[str, str, float | None]]:
    """Name, setting and measured bits: the 16-bit cache, then the best first."""
    yield REFERENCE, REFERENCE, None
    over = _too_large(match, results)
    rows = [(str(p["name"]), str(p["method"]), p["bits"]) for p in match.points]
    rows = [row for row in rows if row[0] not in over]
    yield from sorted(rows, key=lambda row: (results.loss(row[1]), row[1]))


def _too_large(match: Match, results: Results) -> dict[str, str]:
    """Methods that stored more in the run than where they were measured, and how much."""
    found = {}
    for setting in match.points:
        point = results.point(setting["method"])
        stored = point[0] if point else None
        if stored is not None and stored > match.budget * (1 + OVER):
            measured = f"{setting['method']} measured {setting['bits']:.3f} bits"
            found[str(setting["name"])] = f"{measured}, and stored {stored:.3f} in the run"
    return found


def _table(match: Match, results: Results) -> str:
    lines = [
        [
            label(paper_table().methods, name.partition("[")[0]),
            spec.partition("[")[2].removesuffix("]") or MISSING,
            MISSING if measured is None else f"{measured:.2f}",
            *results.cells(spec),
        ]
        for name, spec, measured in _ranked(match, results)
    ]
    table = markdown_table(["Method", "Setting", "Measured", *results.headers], lines, 2)
    return "\n\n".join([table, *map(escape, _absent(_others(match, results)))])


def _others(match: Match, results: Results) -> dict[str, str]:
    """Methods that are not of this size, and why."""
    return {**_too_large(match, results), **match.absent}


def _absent(others: Mapping[str, str]) -> list[str]:
    reasons = (f"{name} ({reason})" for name, reason in others.items())
    return [f"Not at this size: {'; '.join(reasons)}."] if others else []


def _csv_headers(results: Results) -> list[str]:
    own = ["budget", "name", "method", "measured_bits"]
    return [*results.conditions, *own, *results.columns, "absent"]


def _csv_lines(match: Match, results: Results) -> Iterator[list[str]]:
    place = [*map(str, results.conditions.values()), f"{match.budget:g}"]
    for name, spec, measured in _ranked(match, results):
        yield [*place, name, spec, number(measured), *results.values(spec), ""]
    for name, reason in _others(match, results).items():
        yield [*place, name, "", "", *[""] * len(results.columns), reason]


def _draw(matches: Sequence[Match], results: Results, directory: Path) -> Path:
    """Results by stored bits, a line for each method; the 16-bit cache dashed."""
    path = directory / f"matched_{results.file}"
    with figure(path, size=(6.4, 4.8)) as (whole, [axis]):
        names = dict.fromkeys(str(p["name"]) for match in matches for p in match.points)
        for index, name in enumerate(names):
            _line(axis, matches, results, name, index)
        exact = results.exact()
        if exact is not None:
            axis.axhline(exact, color="black", linestyle="--", label="FP16")
        axis.set(xlabel="stored bits an element", ylabel=results.axis, yscale=results.scale)
        if axis.get_legend_handles_labels()[0]:
            legend_below(whole, axis, columns=3)
    return path


def _line(axis: Axes, matches: Sequence[Match], results: Results, name: str, index: int) -> None:
    points = []
    for match in matches:
        for setting in match.points:
            point = results.point(setting["method"])
            if setting["name"] == name and point is not None:
                points.append((point[0] or setting["bits"], point[1]))
    if points:
        x, y = zip(*sorted(points), strict=True)
        shown = name if len(name) <= _LEGEND else f"{name[:_LEGEND]}…"
        axis.plot(x, y, label=shown, **line_style(index))
