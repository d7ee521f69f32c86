"""The look of every figure, and saving it as SVG and PNG, the same to the byte each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's colours, which people with any colour vision tell apart; yellow left out."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""One for each colour, so that no line is known by its colour alone."""
SEQUENTIAL = "cividis"
"""Colour map of magnitudes: its lightness rises evenly, for any colour vision and in grey."""
WIDTH = 6.4
"""Inches; at half of it the 12-point text is still read."""

_DASHES = ("-", "--", ":")

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "font.size": 12,
    "grid.color": "#dddddd",
    "legend.fontsize": 10.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # text stays text: small files, found by search
    "svg.hashsalt": "kvbench",  # element names are random otherwise
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
}
_UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "png": {"Software": None}}


@contextmanager
def figure(
    path: Path,
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float] = (WIDTH, 3.6),
    **subplots: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure and its axes, row by row, in kvbench's style; saved when the with block ends.

    Args:
        path: Where to, without a suffix: `path.svg` and `path.png` are written.
        rows: Rows of axes.
        columns: Columns of axes.
        size: Width and height in inches.
        subplots: Further options of matplotlib's `Figure.subplots`, such as sharey=True.

    Example:
        with figure(out / "accuracy") as (_, [axes]):
            axes.plot(bits, accuracy, color=PALETTE[0], marker=MARKERS[0])
            axes.set(xlabel="bits an element", ylabel="accuracy (%)")
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {**dict(matplotlib.rcParamsDefault.items()), **_STYLE}
    with matplotlib.rc_context(settings):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn, list(drawn.subplots(rows, columns, squeeze=False, **subplots).flat)
        for suffix, metadata in _UNDATED.items():
            content = BytesIO()
            drawn.savefig(content, format=suffix, metadata=metadata)
            path.with_name(f"{path.name}.{suffix}").write_bytes(content.getvalue())


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line `index`, all different up to 21 lines."""
    turn, place = divmod(index, len(PALETTE))
    dashes = _DASHES[turn % len(_DASHES)]
    return {"color": PALETTE[place], "marker": MARKERS[place], "linestyle": dashes}


def legend_below(drawn: Figure, axis: Axes, columns: int = 2) -> None:
    """A legend of one of the axes under the whole figure, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns)


def files(paths: Sequence[Path]) -> list[Path]:
    """The files that `figure` writes for these paths."""
    return [path.with_name(f"{path.name}.{suffix}") for path in paths for suffix in _UNDATED]
