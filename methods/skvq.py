"""SKVQ: channels reordered into similar groups, clipped, with sinks and a sliding window exact."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    MergeHeads,
    Needs,
    Side,
    Sliding,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError

_STARTS = 10
"""k-means runs of which the tightest counts, as in the released calibration (n_init)."""


@dataclass(frozen=True)
class SKVQ:
    """Per token over all heads, groups of uneven size found by k-means on (min, max) of a channel.

    Keys are stored before RoPE. The first `sinks` tokens stay exact, also those that follow a
    shorter prompt, and the newest `window`. The paper searches the clip ratio a group; the released
    code uses one number, as here. With few channels (3 heads of 64: two groups) reordering has
    little to choose from; compare at equal group sizes. Deviations from that code: real packing
    instead of simulation, codes computed with the metadata as stored, each token's own position
    under padding and M-RoPE.
    """

    label: ClassVar[str] = "SKVQ"
    paper: ClassVar[str] = "arXiv 2405.06219"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 4, 8),
        "group_size": (32, 64, 128),
        "window": (0, 4, 8, 16, 32, 64, 128),
        "sinks": (0, 5),
        "metadata": ("fp16", "fp8"),
    }

    bits: int = 2
    group_size: int = 128
    window: int = 128
    sinks: int = 5
    clip: float = 0.92
    reorder: bool = True
    pre_rope: bool = True
    metadata: Literal["fp16", "fp8"] = "fp16"
    seed: int = 0

    @property
    def needs(self) -> Needs:
        """Ranges of every channel, if channels are reordered."""
        names = ("key_min", "key_max", "value_min", "value_max")
        return Needs(statistics=names if self.reorder else ())

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative count or seed.
        """
        check_fields(self)
        if self.sinks < 0 or self.seed < 0 or self.group_size < 1:
            raise UserError(
                "SKVQ's sinks and seed can't be negative and its group size must be positive."
            )

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Reordered groups over all heads."""
        if calibration is None and self.reorder:
            raise UserError("SKVQ needs calibrated statistics; run `kvbench calibrate`.")
        key, value = (self._side(spec, calibration, name) for name in ("key", "value"))
        return LayerQuantizer(key, value, Uniform(self.bits, sinks=self.sinks))

    def _side(self, spec: LayerSpec, calibration: Calibration | None, name: str) -> Side:
        channels = spec.num_kv_heads * spec.head_dim
        size = min(self.group_size, channels)
        order, group = (
            None,
            (size,) * (channels // size) + ((channels % size,) * bool(channels % size)),
        )
        if self.reorder and calibration is not None:
            low, high = (calibration.of(f"{name}_{end}", spec.index) for end in ("min", "max"))
            order, group = _clusters(low.flatten(), high.flatten(), -(-channels // size), self.seed)
        codec = Affine(self.bits, group, zero="float", clip=self.clip, metadata=self.metadata)
        return Side(
            {self.bits: codec},
            MergeHeads(spec, order),
            Sliding(self.window),
            pre_rope=self.pre_rope and name == "key",
        )


def _clusters(low: Tensor, high: Tensor, count: int, seed: int) -> tuple[Tensor, tuple[int, ...]]:
    """Channel order and group sizes; channels of one k-means cluster stand side by side."""
    return _kmeans(tuple(low.tolist()), tuple(high.tolist()), count, seed)


@lru_cache(maxsize=512)
def _kmeans(
    low: tuple[float, ...], high: tuple[float, ...], count: int, seed: int
) -> tuple[Tensor, tuple[int, ...]]:
    points = np.array([low, high], dtype=np.float64).T
    count, generator = min(count, len(np.unique(points, axis=0))), np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster may stay empty: the others are then larger
        starts = [kmeans2(points, count, minit="++", seed=generator) for _ in range(_STARTS)]
    _, labels = min(starts, key=lambda found: float(((points - found[0][found[1]]) ** 2).sum()))
    sizes = np.bincount(labels, minlength=count)
    order = torch.from_numpy(np.argsort(labels, kind="stable"))
    return order, tuple(int(size) for size in sizes if size)


METHODS: dict[str, KVQuantizer] = {"skvq": SKVQ()}
