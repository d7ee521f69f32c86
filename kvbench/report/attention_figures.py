"""Figures of attention: by position, by modality and head, by pivot (AKVQ-VL, Figures 1, 3, 4)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.report.columns import Columns, Numbers, read_columns
from kvbench.report.figures import (
    PALETTE,
    SEQUENTIAL,
    WIDTH,
    figure,
    legend_below,
    line_style,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST = 1e-5
"""Smallest attention that the colours tell from none."""


def draw_attention(folder: Path) -> list[Path]:
    """Draw the figures whose tables stand in an analysis folder; returns paths without suffix."""
    drawn = [_maps(folder), _positions(folder)]
    heads = read_columns(folder / "attention_by_head.csv")
    if heads.lines:  # none without images
        drawn.append(_heads(heads, folder))
    return [*drawn, _detector(folder)]


def _maps(folder: Path) -> Path:
    """Figure 1: queries by keys, in a few layers."""
    table, positions = (
        read_columns(folder / f"attention_{name}.csv") for name in ("maps", "by_position")
    )
    layers = table.distinct("layer")
    size = (WIDTH, 2.9 * -(-len(layers) // 2))
    path = folder / "attention_maps"
    with figure(path, -(-len(layers) // 2), 2, size=size) as (whole, axes):
        for axis, layer in zip(axes, layers, strict=False):
            part = table.where("layer", layer)
            image = _image(axis, *_grid(part["query"], part["key"], part["attention"]))
            axis.set_title(f"layer {layer} (bar: vision tokens)", pad=10)
            axis.set(xlabel="key (token)", ylabel="query (token)")
            _mark_vision(axis, positions)
        for axis in axes[len(layers) :]:
            axis.remove()
        whole.colorbar(image, ax=axes[: len(layers)], label="mean attention", shrink=0.8)
    return path


def _positions(folder: Path) -> Path:
    """Figure 3: what each position gets in each layer."""
    table = read_columns(folder / "attention_by_position.csv")
    path = folder / "attention_by_position"
    with figure(path, size=(WIDTH, 4.2)) as (whole, [axis]):
        image = _image(axis, *_grid(table["layer"], table["token"], table["attention"]))
        axis.set(xlabel="key (token; bar: vision tokens)", ylabel="layer")
        _mark_vision(axis, table)
        whole.colorbar(image, ax=axis, label="mean attention a key gets")
    return path


def _grid(rows: Numbers, columns: Numbers, values: Numbers) -> tuple[Numbers, list[float]]:
    """Values as an image with its extent; NaN where the table has no line."""
    ups, acrosses = np.unique(rows), np.unique(columns)
    image = np.full((len(ups), len(acrosses)), np.nan)
    image[np.searchsorted(ups, rows), np.searchsorted(acrosses, columns)] = values
    step, width = (axis[1] - axis[0] if len(axis) > 1 else 1.0 for axis in (ups, acrosses))
    centred = 0.5 if step == 1 else 0.0  # a layer is a number, not a stretch of tokens
    low, high = ups[0] - centred, ups[-1] + step - centred
    return image, [acrosses[0], acrosses[-1] + width, high, low]


def _image(axis: Axes, image: Numbers, extent: list[float]) -> Any:
    from matplotlib.colors import LogNorm

    axis.grid(visible=False)
    left, right, bottom, top = extent
    return axis.imshow(
        np.maximum(image, _LEAST),
        cmap=SEQUENTIAL,
        norm=LogNorm(_LEAST, 1),
        aspect="auto",
        interpolation="nearest",
        extent=(left, right, bottom, top),
    )


def _mark_vision(axis: Axes, positions: Columns) -> None:
    """A bar above the axes where most tokens are vision tokens."""
    first = positions.where("layer", positions.texts("layer")[0])
    starts, shares = first["token"], first["vision_share"]
    width = starts[1] - starts[0] if len(starts) > 1 else 1.0
    across = axis.get_xaxis_transform()
    for start in starts[shares >= 0.5]:
        bar = ([start, start + width], [1.02, 1.02])
        axis.plot(
            *bar,
            color=PALETTE[1],
            linewidth=4,
            solid_capstyle="butt",
            transform=across,
            clip_on=False,
        )


def _heads(table: Columns, folder: Path) -> Path:
    """Figure 4: a text token's attention beside a vision token's, head by head."""
    layers = table.distinct("layer")
    shown = list(dict.fromkeys([*layers[:2], layers[len(layers) // 2]]))
    path = folder / "attention_by_head"
    with figure(path, len(shown), size=(WIDTH, 0.5 + 2.2 * len(shown))) as (whole, axes):
        for axis, layer in zip(axes, shown, strict=True):
            part = table.where("layer", layer)
            for index, kind in enumerate(("text", "vision")):
                _bars(axis, part, kind, index)
            axis.set(title=f"layer {layer}", ylabel="attention (%)")
        axes[-1].set(xlabel="head")
        legend_below(whole, axes[0])
    return path


def _bars(axis: Axes, part: Columns, kind: str, index: int) -> None:
    heads, values = part["head"], 100 * part[kind]
    low, high = 100 * part[f"{kind}_low"], 100 * part[f"{kind}_high"]
    axis.bar(
        heads + 0.4 * (index - 0.5),
        values,
        0.4,
        yerr=np.nan_to_num(np.stack((values - low, high - values))),
        color=PALETTE[index],
        hatch="" if index == 0 else "//",
        edgecolor="white",
        label=f"a {kind} token",
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    axis.set_xticks(heads)


def _detector(folder: Path) -> Path:
    """How well massive activations find the tokens that draw the attention."""
    table = read_columns(folder / "pivot_detector.csv")
    panels = (
        ("share of tokens", {"precision": "precision", "recall": "recall"}),
        ("share of attention", {"captured": "detected tokens", "top15": "best 15 tokens"}),
    )
    path = folder / "pivot_detector"
    with figure(path, 1, 2, size=(WIDTH, 4.0)) as (_, axes):
        for axis, (label, names) in zip(axes, panels, strict=True):
            for index, (name, text) in enumerate(names.items()):
                band(axis, table, name, line_style(index), text)
            axis.set(xlabel="layer", ylabel=label, ylim=(0, 1.03))
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1)
    return path


def band(axis: Axes, table: Columns, name: str, style: dict[str, Any], label: str) -> None:
    """A column by layer as a line, its interval as a band around it."""
    layers = table["layer"]
    axis.plot(layers, table[name], label=label, markersize=4, **style)
    ends = table[f"{name}_low"], table[f"{name}_high"]
    axis.fill_between(layers, *ends, color=style["color"], alpha=0.2, linewidth=0)
