"""Figure 9 and throughput: peak memory, and tokens a second, against batch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.report.efficiency import EfficiencyBlock, Entry, efficiency_blocks, measure, peak
from kvbench.report.figures import MARKERS, PALETTE, figure, files
from kvbench.report.text import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvbench.efficiency.rows import EfficiencyRow

_GIB = 1 << 30
Measure = Callable[[Entry], float | None]


def write_figures(directory: Path, rows: Iterable[EfficiencyRow]) -> list[Path]:
    """Draw every block's memory and throughput into `directory`, as SVG and PNG.

    Methods with one batch are points. Returns the files written; a block without figures has none.
    """
    blocks = [b for b in efficiency_blocks(rows) if any(entry.ran for entry in b.entries)]
    paths = []
    for block, suffix in zip(blocks, _suffixes(blocks), strict=True):
        memory = directory / f"figure9{suffix}"
        _draw(block, memory, "peak memory (GiB)", lambda entry: _scaled(peak(entry.row), _GIB))
        speed = directory / f"throughput{suffix}"
        modelled = block.setting.memory == "modelled"
        title = "tokens/s, upper bound" if modelled else "tokens/s, prompts included"
        _draw(block, speed, title, _throughput)
        paths += [memory, speed]
    return files(paths)


def _draw(block: EfficiencyBlock, path: Path, title: str, value: Measure) -> None:
    with figure(path) as (_, [axes]):
        for index, (name, points) in enumerate(_series(block, value).items()):
            axes.plot(
                *zip(*points, strict=True),
                color=PALETTE[index % len(PALETTE)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle=("-", "--", ":")[index // len(PALETTE) % 3],
                label=_shown(name),
            )
        if "memory" in title:
            _mark_limit(axes, block)
        setting = block.setting
        basis = "" if setting.memory == "measured" else f" ({setting.memory})"
        axes.margins(y=0.1)
        axes.set(xlabel="batch (rows)", ylabel=title, xlim=(0, None), ylim=(0, None))
        axes.set_title(_shown(f"{setting.model_label}, {setting.gpu_label}{basis}"))
        axes.legend()


def _series(block: EfficiencyBlock, value: Measure) -> dict[str, list[tuple[int, float]]]:
    """Points of each method by batch; where a batch has two rows, the searched one comes last."""
    found: dict[str, dict[int, float]] = {}
    for entry in (*block.fixed, *block.largest):
        number = value(entry) if entry.ran else None
        if number is not None:
            found.setdefault(entry.name, {})[entry.row.batch] = number
    order = dict.fromkeys(entry.name for entry in block.entries)
    return {name: sorted(found[name].items()) for name in order if name in found}


def _mark_limit(axes: Axes, block: EfficiencyBlock) -> None:
    limit = block.setting.memory_limit
    if limit is not None:
        axes.axhline(limit / _GIB, color="#444444", linestyle=(0, (6, 3)), linewidth=1.2)
        axes.annotate(
            f"limit {limit / _GIB:.0f} GiB",
            (1, limit / _GIB),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=10.5,
            color="#444444",
        )


def _throughput(entry: Entry) -> float | None:
    return measure(entry.row, "throughput")


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _shown(text: str) -> str:
    """Text that matplotlib draws as it is: no formulas, and no name that hides a line."""
    escaped = plain(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _suffixes(blocks: list[EfficiencyBlock]) -> list[str]:
    """Ends of file names: none for a single block, else what the blocks are of."""
    if len(blocks) == 1:
        return [""]
    names = [
        f"_{b.setting.model}_{b.setting.gpu}_{b.setting.input_tokens}_{b.setting.output_tokens}"
        for b in blocks
    ]
    clean = [re.sub(r"[^\w.-]", "-", name) for name in names]
    return [
        name if clean.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(clean, 1)
    ]
