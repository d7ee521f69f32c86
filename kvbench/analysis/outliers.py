"""Outlier channels of keys and values, before and after the Walsh-Hadamard transform (Figure 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.analysis.capture import LayerView
from kvbench.cache import Rotate


@dataclass(frozen=True)
class ChannelMagnitudes:
    """One side of one layer on a prompt.

    Attributes:
        before: (H, D) float32, mean |x| of each channel over tokens.
        after: (H, D) the same after the transform.
        crest_before: Mean over tokens and heads of max |x| over root mean square: how much of a
            per-token range its largest channels take.
        crest_after: The same after the transform.
    """

    before: Tensor
    after: Tensor
    crest_before: float
    crest_after: float


def outlier_ratio(channels: Tensor) -> float:
    """Largest channel over the median channel of (H, D) mean magnitudes, mean over heads."""
    middle = channels.median(-1).values.clamp_min(torch.finfo(channels.dtype).tiny)
    return float((channels.amax(-1) / middle).mean())


def magnitudes(view: LayerView) -> dict[str, ChannelMagnitudes]:
    """Magnitudes of a layer's "keys" and "values"."""
    rotate = Rotate(view.spec.head_dim, "key")
    found = {}
    for side, states in (("keys", view.keys.float()), ("values", view.values.float())):
        turned = rotate.store(states[None])[0]
        found[side] = ChannelMagnitudes(
            states.abs().mean(1).cpu(),
            turned.abs().mean(1).cpu(),
            _crest(states),
            _crest(turned),
        )
    return found


def _crest(states: Tensor) -> float:
    """Mean over (H, T, D)'s vectors of their largest magnitude over their root mean square."""
    size = states.square().mean(-1).sqrt().clamp_min(torch.finfo(states.dtype).tiny)
    return float((states.abs().amax(-1) / size).mean())
