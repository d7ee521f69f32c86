"""The page's figures: SVG that takes its colours from the page, for light, dark and print."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.defaults import REFERENCE
from kvbench.report.board import Block
from kvbench.report.cells import Cell, Comparison
from kvbench.report.efficiency_figures import write_figures
from kvbench.report.figures import PALETTE, WIDTH, figure, legend_below, line_style
from kvbench.report.paper import label, paper_table
from kvbench.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvbench.efficiency.rows import EfficiencyRow

_MEGA = 1e6
_PANELS = 3
# What figures.py draws with -> the page's own colours; black text has no colour written beside it.
_THEME = {
    "#ffffff": "var(--paper)",
    "#000000": "var(--ink)",
    "#444444": "var(--axis)",
    "#dddddd": "var(--grid)",
    **{color.lower(): f"var(--c{place})" for place, color in enumerate(PALETTE[:-1])},
}


@dataclass(frozen=True)
class Chart:
    """A figure: SVG for inside a page, and its content in words."""

    svg: str
    words: str


def tradeoff(block: Block, name: str) -> Chart | None:
    """Accuracy against cache bytes, means over tasks, with the Pareto front.

    Returns:
        None where fewer than two methods have both: simulated and foreign storage have no bytes.
    """
    points = [
        (cell.cache_bytes / _MEGA, 100 * cell.accuracy, method, cell)
        for method in block.methods
        if (cell := block.overall[method]).cache_bytes is not None and cell.accuracy is not None
    ]
    if len(points) < 2:
        return None
    best = front([(size, accuracy) for size, accuracy, _, _ in points])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with figure(path, size=(WIDTH, 4.8)) as (drawn, [axes]):
            axes.plot(
                *zip(*best, strict=True), color="#444444", linewidth=1.2, label="Pareto front"
            )
            for place, (size, accuracy, method, cell) in enumerate(points):
                _point(axes, place, (size, accuracy), cell, label(paper_table().methods, method))
            axes.set(xlabel="cache a sample (MB)", ylabel="accuracy, mean (%)", xlim=(0, None))
            legend_below(drawn, axes, columns=3)
        svg = inline(path.with_name(f"{name}.svg").read_text(encoding="utf-8"), name)
    names = [label(paper_table().methods, m) for size, y, m, _ in points if (size, y) in best]
    return Chart(svg, f"Accuracy against cache bytes. On the Pareto front: {', '.join(names)}.")


def forest(block: Block, name: str) -> Chart | None:
    """Each method's differences to fp16 by task, with intervals; None where nothing is compared."""
    methods = [m for m in block.methods if m != REFERENCE and block.overall[m].comparison]
    if not methods:
        return None
    columns = min(_PANELS, len(methods))
    rows = -(-len(methods) // columns)
    height = rows * (0.24 * len(_row_names(block)) + 0.65) + 0.5
    size = (max(WIDTH, 2.6 * columns), height)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        with figure(path, rows, columns, size=size, sharex=True, sharey=True) as (drawn, axes):
            for panel, method in zip(axes, methods, strict=False):
                _panel(panel, block, method)
            for unused in axes[len(methods) :]:
                unused.set_axis_off()
            axes[0].set_ylim(len(_row_names(block)) - 0.4, -0.6)
            drawn.supxlabel("difference to FP16 (points)", fontsize=12)
        svg = inline(path.with_name(f"{name}.svg").read_text(encoding="utf-8"), name)
    return Chart(svg, "Difference to FP16 by task and method; the table below has the numbers.")


def efficiency_charts(rows: Iterable[EfficiencyRow]) -> list[Chart]:
    """The figures of memory and throughput that stand beside ``table4.md``."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for path in write_figures(Path(folder), rows) if path.suffix == ".svg"]
        return [
            Chart(
                inline(path.read_text(encoding="utf-8"), f"speed{place}"),
                "Peak memory by batch."
                if path.name.startswith("figure9")
                else "Tokens a second by batch.",
            )
            for place, path in enumerate(paths)
        ]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (bytes, accuracy) that none beats in one without losing in the other."""
    best: list[tuple[float, float]] = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or accuracy > best[-1][1]:
            best.append((size, accuracy))
    return best


def inline(svg: str, name: str) -> str:
    """Return matplotlib's SVG file as an element of a page.

    Its element names get the figure's own prefix, its colours become the page's, and its style
    sheet, which would hold for the whole page, and its fixed size go.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    head, bracket, body = svg.partition(">")
    head = re.sub(r' (?:width|height|version)="[^"]*"| xmlns(?::\w+)?="[^"]*"', "", head)
    head += ' aria-hidden="true" focusable="false"'
    # Only inside tags: text between them is the data's.
    return head + bracket + re.sub(r"<[^<>]*>", lambda tag: _adapted(tag[0], name), body)


def _adapted(tag: str, name: str) -> str:
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return re.sub(r"#[0-9a-fA-F]{6}\b", lambda c: _THEME.get(c[0].lower(), c[0]), tag)


def _point(axes: Axes, place: int, at: tuple[float, float], cell: Cell, name: str) -> None:
    style = line_style(place) | {"linestyle": "none"}
    if place >= len(PALETTE):
        style |= {"markerfacecolor": "#ffffff"}
    spread = None
    if cell.interval is not None:
        ends = (100 * cell.interval.low, 100 * cell.interval.high)
        spread = [[max(0.0, at[1] - ends[0])], [max(0.0, ends[1] - at[1])]]
    axes.errorbar([at[0]], [at[1]], yerr=spread, capsize=3, label=_shown(name), **style)


def _panel(axes: Axes, block: Block, method: str) -> None:
    paper = paper_table()
    found = {
        label(paper.tasks, task): cell.comparison
        for task in block.tasks
        if (cell := block.cells.get((method, task))) is not None
    }
    lines: dict[str, Comparison | None] = {**found, "Mean": block.overall[method].comparison}
    axes.axvline(0, color="#444444", linewidth=1)
    names = _row_names(block)
    for place, name in enumerate(names):
        if (comparison := lines.get(name)) is not None:
            _whisker(axes, place, comparison)
    axes.set_yticks(range(len(names)), [_shown(name) for name in names], fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_title(_shown(label(paper.methods, method)), fontsize=10.5)


def _row_names(block: Block) -> list[str]:
    """Tasks from top to bottom, and their mean if there are several."""
    names = [label(paper_table().tasks, task) for task in block.tasks]
    return [*names, "Mean"] if len(names) > 1 else names


def _whisker(axes: Axes, place: int, found: Comparison) -> None:
    """Filled where the interval leaves out 0, hollow where it does not."""
    middle, low, high = (
        100 * share for share in (found.difference, found.interval.low, found.interval.high)
    )
    apart = low > 0 or high < 0
    axes.errorbar(
        [middle],
        [place],
        xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
        color=PALETTE[1] if apart else PALETTE[0],
        marker="o",
        markersize=4,
        markerfacecolor=PALETTE[1] if apart else "#ffffff",
        linewidth=1.4,
    )


def _shown(text: str) -> str:
    """Text that matplotlib draws as it is: no formulas, and no name that hides a line."""
    escaped = plain(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped
