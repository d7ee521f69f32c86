"""Figures of states and their errors: massive activations, outlier channels, error by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvbench.report.attention_figures import band
from kvbench.report.columns import Columns, read_columns
from kvbench.report.figures import WIDTH, figure, legend_below, line_style

_LEAST_KL = 1e-8
"""Nats; below it is rounding."""


def draw_errors(folder: Path) -> list[Path]:
    """Draw the figures whose tables stand in an analysis folder; returns paths without suffix."""
    drawn = [_massive(folder), _channels(folder), _outliers(folder)]
    if (folder / "errors.csv").exists():
        errors = read_columns(folder / "errors.csv")
        drawn += [_errors(errors, folder), _influence(errors, folder)]
    return drawn


def _massive(folder: Path) -> Path:
    table = read_columns(folder / "massive_activations.csv")
    names = {
        "largest": "largest token",
        "second": "second",
        "third": "third",
        "rank15": "15th",
        "median": "median of all numbers",
    }
    path = folder / "massive_activations"
    with figure(path, size=(WIDTH, 4.2)) as (whole, [axis]):
        for index, (name, label) in enumerate(names.items()):
            axis.plot(table["layer"], table[name], label=label, **line_style(index))
        axis.set(xlabel="layer (its input)", ylabel="magnitude", yscale="log")
        legend_below(whole, axis, 3)
    return path


def _channels(folder: Path) -> Path:
    """Figure 5: magnitudes by channel, before and after the transform."""
    table = read_columns(folder / "channels.csv")
    sides = table.distinct("side")
    path = folder / "channels"
    with figure(path, len(sides), size=(WIDTH, 0.5 + 2.7 * len(sides))) as (whole, axes):
        for axis, side in zip(axes, sides, strict=True):
            part = table.where("side", side)
            layer, head = part.texts("layer")[0], part.texts("head")[0]
            ratios = []
            for index, (name, label) in enumerate(
                {"before": "as they are", "after": "after the Hadamard transform"}.items()
            ):
                style = line_style(index) | {"marker": ""}
                axis.plot(part["channel"], part[name], label=label, **style)
                ratios.append(part[name].max() / np.median(part[name]))
            before, after = ratios
            axis.set(
                title=f"{side}, layer {layer}, head {head}: "
                f"largest over median channel {before:.1f} → {after:.1f}",
                ylabel="mean magnitude",
                ylim=(0, None),
            )
        axes[-1].set(xlabel="channel")
        legend_below(whole, axes[0])
    return path


def _outliers(folder: Path) -> Path:
    table = read_columns(folder / "outliers.csv")
    path = folder / "outliers"
    with figure(path, 1, 2, size=(WIDTH, 3.8), sharey=True) as (whole, axes):
        for axis, side in zip(axes, ("keys", "values"), strict=True):
            part = table.where("side", side)
            band(axis, part, "ratio_before", line_style(0), "as they are")
            band(axis, part, "ratio_after", line_style(1), "after Hadamard")
            axis.set(title=side, xlabel="layer")
        axes[0].set(ylabel="largest over median channel", ylim=(0, None))
        legend_below(whole, axes[0])
    return path


def _errors(table: Columns, folder: Path) -> Path:
    """Relative error of keys, values and attention output, a line for each method."""
    panels = {"key": "keys", "value": "values", "output": "attention output"}
    path = folder / "errors"
    with figure(path, len(panels), size=(WIDTH, 7.2), sharex=True) as (whole, axes):
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            for index, method in enumerate(table.distinct("method")):
                band(axis, table.where("method", method), name, line_style(index), method)
            axis.set(title=title, ylabel="relative error", ylim=(0, None))
        axes[-1].set(xlabel="layer")
        legend_below(whole, axes[0])
    return path


def _influence(table: Columns, folder: Path) -> Path:
    """What one layer alone does to the first answer token, a line for each method."""
    protocols = [name for name in ("exact", "quantized") if np.isfinite(table[f"kl_{name}"]).any()]
    path = folder / "layer_influence"
    size = (WIDTH, 1 + 2.9 * len(protocols))
    with figure(path, len(protocols), size=size, sharex=True) as (whole, axes):
        for axis, protocol in zip(axes, protocols, strict=True):
            for index, method in enumerate(table.distinct("method")):
                part = table.where("method", method)
                style = line_style(index)
                divergence = np.maximum(part[f"kl_{protocol}"], _LEAST_KL)
                axis.plot(part["layer"], divergence, label=method, **style)
            axis.set(title=f"{protocol}_prefill", ylabel="KL (nats)", yscale="log")
        axes[-1].set(xlabel="the one layer that is quantized")
        legend_below(whole, axes[0])
    return path
