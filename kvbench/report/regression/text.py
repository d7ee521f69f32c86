"""A comparison to read in ten seconds: on a terminal, and as Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from tabulate import tabulate

from kvbench.report.paper import label, paper_table
from kvbench.report.regression.result import MEAN, Comparison, Kind, Line, Method
from kvbench.report.text import MISSING, escape, markdown_table, p_value, percent, plain

HEADERS = (
    "Method",
    "Before",
    "Now",
    "Difference",
    "Lost",
    "Gained",
    "Detectable",
    "KL",
    "Bits",
    "Cache bytes",
    "Verdict",
)
_NARROW = [name for name in HEADERS if name != "Detectable"]
"""On a terminal the last line says it for all methods together."""

_SHOWN = 4
"""Tasks that are named in a line."""


def comparison_text(comparison: Comparison) -> str:
    """Return the tables, what is wrong, and what these samples can show, as plain text."""
    parts = []
    for title, methods in _blocks(comparison):
        table = tabulate(
            [[plain(cell) for cell in _narrow(method)] for method in methods],
            headers=_NARROW,
            tablefmt="simple",
            disable_numparse=True,
            colalign=["left", *["right"] * (len(_NARROW) - 2), "left"],
        )
        parts.append(f"{plain(title)}\n\n{table}")
    faults = [f"  {plain(text)}" for text in findings(comparison)]
    notes = [f"note: {plain(text)}" for text in comparison.notes]
    parts.append("\n".join([verdict(comparison), *faults, *notes, power(comparison)]))
    return "\n\n".join(parts) + "\n"


def comparison_markdown(comparison: Comparison) -> str:
    """Return the same for a pull request, with the tasks whose answers changed."""
    parts = [f"## {escape(verdict(comparison))}"]
    if faults := [f"- {escape(text)}" for text in findings(comparison)]:
        parts.append("\n".join(faults))
    for title, methods in _blocks(comparison):
        table = markdown_table(HEADERS, [_cells(method) for method in methods], texts=1)
        parts += [f"### {escape(title)}", table]
    if lines := [line for method in comparison.methods for line in method.tasks if _moved(line)]:
        headers = ("Protocol", "Method", "Task", *HEADERS[1:-1], "p")
        table = markdown_table(headers, [_task_cells(line) for line in lines], texts=3)
        parts.append(
            f"<details><summary>{len(lines)} tasks changed</summary>\n\n{table}\n\n</details>"
        )
    notes = [f"- note: {escape(text)}" for text in comparison.notes]
    parts.append("\n".join([*notes, f"- {escape(power(comparison))}"]))
    return "\n\n".join(parts) + "\n"


def verdict(comparison: Comparison) -> str:
    """Return the outcome in a line."""
    bad = sum(bool(method.faults) for method in comparison.methods)
    total = len(comparison.methods)
    if bad:
        return f"FAIL: {bad} of {total} methods and protocols got worse"
    return f"OK: none of {total} methods and protocols got worse"


def findings(comparison: Comparison) -> list[str]:
    """Return what is wrong, a line for each kind of fault of a method."""
    return [
        f"{method.mean.key.method}, {method.mean.key.protocol}: {_finding(kind, lines)}"
        for method in comparison.methods
        for kind, lines in method.faults.items()
    ]


def power(comparison: Comparison) -> str:
    """Return how small a drop these samples can show."""
    means = [method.mean for method in comparison.methods]
    tasks = [line for method in comparison.methods for line in method.tasks]
    limits = comparison.limits
    return (
        f"smallest drop that shows: {_reach(means, limits.max_drop)} in a mean, "
        f"{_reach(tasks, limits.max_drop)} in a task (more than {limits.max_drop:g} points, and "
        f"p < {comparison.level:.2g}, which is {limits.alpha:g} over all tasks and means)"
    )


def _blocks(comparison: Comparison) -> Iterable[tuple[str, list[Method]]]:
    def place(method: Method) -> tuple[str, str]:
        return method.mean.key.model, method.mean.key.protocol

    for (model, protocol), group in groupby(comparison.methods, key=place):
        methods = list(group)
        tasks = {line.key.task for method in methods for line in method.tasks}
        samples = max(method.mean.counts.n for method in methods)
        yield f"{model}, {protocol}: {len(tasks)} tasks, {samples} samples a method", methods


def _cells(method: Method) -> list[str]:
    name = label(paper_table().methods, method.mean.key.method)
    return [name, *_numbers(method.mean), _word(method)]


def _narrow(method: Method) -> list[str]:
    return [cell for name, cell in zip(HEADERS, _cells(method), strict=True) if name in _NARROW]


def _task_cells(line: Line) -> list[str]:
    key, paper = line.key, paper_table()
    task = label(paper.tasks, key.task)
    return [key.protocol, label(paper.methods, key.method), task, *_numbers(line), p_value(line.p)]


def _numbers(line: Line) -> list[str]:
    return [
        percent(line.before),
        percent(line.now),
        _difference(line),
        str(line.counts.lost),
        str(line.counts.gained),
        percent(line.detectable),
        MISSING if line.divergence is None else f"x {line.divergence.ratio:.2f}",
        _change(line.bits, 2),
        _change(line.nbytes, 0),
    ]


def _difference(line: Line) -> str:
    if line.interval is None or not line.counts.lost + line.counts.gained:
        return percent(line.difference, "+")
    low, high = percent(line.interval.low, "+"), percent(line.interval.high, "+")
    return f"{percent(line.difference, '+')} [{low}, {high}]"


def _change(values: tuple[float | None, float | None], digits: int) -> str:
    """Before and now, or one of them where they look the same."""
    old, new = (MISSING if value is None else f"{value:,.{digits}f}" for value in values)
    return old if old == new else f"{old} to {new}"


def _word(method: Method) -> str:
    if method.faults:
        return ", ".join(kind.upper() for kind in method.faults)
    flips = method.mean.counts.lost + method.mean.counts.gained
    return "ok" if flips else "unchanged"


def _finding(kind: Kind, lines: Sequence[Line]) -> str:
    """``mean dropped by 4.0 points (p = 1e-5); so did oe, st``; for the rest, tasks and texts."""
    text = next(fault.text for fault in lines[0].faults if fault.kind is kind)
    first, *others = [line.key.task for line in lines]
    if not others:
        return f"{first} {text}"
    more = ", ".join(others[:_SHOWN]) + (" ..." if len(others) > _SHOWN else "")
    count = f"{len(others)} more: " if first != MEAN else f"and {len(others)} tasks: "
    return f"{first} {text} ({count}{more})"


def _moved(line: Line) -> bool:
    return bool(line.faults or line.counts.lost or line.counts.gained)


def _reach(lines: Sequence[Line], max_drop: float) -> str:
    """The smallest drop that shows, of the line that shows most and of the one that shows least."""
    found = [max(100 * line.detectable, max_drop) for line in lines if line.detectable is not None]
    if not found:
        return "none, for want of samples,"
    low, high = f"{min(found):.1f}", f"{max(found):.1f}"
    return f"{low} points" if low == high else f"{low} to {high} points"
