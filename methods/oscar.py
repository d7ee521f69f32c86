"""OSCAR: 2 bits behind a calibrated rotation, ends of the sequence exact (arXiv 2605.17757)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Orthogonal,
    Packed,
    Rotate,
    Side,
    Sliding,
    Transform,
    Uniform,
    check_fields,
    rotation,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class PercentileClipped(Affine):
    """F1p: groups are clamped to ±τ before their range is taken.

    τ is the group's own |x| of rank min(⌊keep · size⌋, size − 1) from below; keep 0 clamps nothing.
    """

    keep: float = 0.0

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes and metadata, as `Affine` stores them."""
        if not self.keep or not isinstance(self.group, int):
            return super().encode(x)
        groups = x.float().unflatten(-1, (-1, self.group))
        rank = min(int(self.keep * self.group), self.group - 1)
        limit = groups.abs().kthvalue(rank + 1, dim=-1, keepdim=True).values
        return super().encode(groups.clamp(-limit, limit).flatten(-2))


@dataclass(frozen=True)
class OSCAR:
    """R = U H P: eigenvectors of a calibrated second moment, Hadamard, an order of the channels.

    Keys (after RoPE) and queries are turned by the moment of the queries, values by that of the
    values, a token weighted with kᵀ(QᵀQ)k; both averaged over key/value heads, or one rotation a
    head with `per_head`. P puts the channel of the i-th largest eigenvalue at the bit-reversed i,
    which matters for groups smaller than a head; the columns of U come in the order of ascending
    eigenvalues. The first `sinks` tokens stay exact, also those that follow a shorter prompt, and
    the newest `recent`, which leave the window eight at a time: whenever the tokens before it,
    sinks included, are a multiple of eight. `rotation="hadamard"` and `"identity"` are the
    ablations that need no calibration.

    Deviations from the released code: codes are rounded half to even, half up there; scale and
    minimum are rounded to float16 before codes are made, as its quoted bits count them, where its
    recipes keep a float32 scale and zero-point; the rotated basis also holds the exact tokens;
    heads whose size is no power of two get a Paley-Sylvester matrix and no P; its Lloyd-Max mode
    and second pass on residuals are not offered. The authors calibrated on prompts of the
    benchmarks they report; here it is data that no task scores.
    """

    label: ClassVar[str] = "OSCAR"
    paper: ClassVar[str] = "arXiv 2605.17757"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 3, 4),
        "group_size": (64, 128),
        "sinks": (0, 16, 64),
        "recent": (0, 32, 256),
    }

    bits: int = 2
    group_size: int = 128
    sinks: int = 64
    recent: int = 256
    flush_every: int = 8
    key_keep: float = 0.96
    value_keep: float = 0.92
    rotation: Literal["calibrated", "hadamard", "identity"] = "calibrated"
    per_head: bool = False

    @property
    def needs(self) -> Needs:
        """Second moments, for a calibrated rotation."""
        names = ("query_second_moment", "value_second_moment")
        return Needs(statistics=names if self.rotation == "calibrated" else ())

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative count, or a share outside [0, 1].
        """
        check_fields(self)
        Sliding(self.recent, flush_every=self.flush_every)
        if self.sinks < 0 or self.group_size < 1:
            raise UserError("OSCAR's sinks can't be negative and its group size must be positive.")
        for name, value in (("key_keep", self.key_keep), ("value_keep", self.value_keep)):
            if not 0 <= value <= 1:
                raise UserError(f"OSCAR's {name} must lie in [0, 1], not {value}.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Two clipped codecs behind two rotations."""
        group = min(self.group_size, spec.head_dim)
        window = Sliding(self.recent, flush_every=self.flush_every)
        key, value = (
            Side(
                {self.bits: PercentileClipped(self.bits, group, zero="float", keep=keep)},
                self._transform(spec, calibration, side, statistic),
                window,
            )
            for side, statistic, keep in (
                ("key", "query_second_moment", self.key_keep),
                ("value", "value_second_moment", self.value_keep),
            )
        )
        return LayerQuantizer(key, value, Uniform(self.bits, self.sinks))

    def _transform(
        self, spec: LayerSpec, calibration: Calibration | None, side: str, statistic: str
    ) -> Transform:
        if self.rotation == "identity":
            return Transform()
        if self.rotation == "hadamard":
            return Rotate(spec.head_dim, side)
        if calibration is None:
            raise UserError(
                "OSCAR needs calibrated statistics; run `kvbench calibrate` or set "
                "rotation=hadamard."
            )
        moment = calibration.of(statistic, spec.index).double()
        if not bool(moment.isfinite().all()):
            raise UserError(f"the calibrated {statistic} is not finite; calibrate again.")
        moments = moment if self.per_head else moment.mean(0, keepdim=True)
        return Orthogonal(torch.stack([eigen_rotation(one) for one in moments]), side)


def eigen_rotation(moment: Tensor) -> Tensor:
    """R = U H P (D, D) float64 of a second moment (D, D)."""
    order = moment.shape[0]
    vectors = torch.linalg.eigh((moment + moment.mT) / 2).eigenvectors
    # An eigenvector's sign is the library's whim: let its largest number be positive.
    largest = vectors.abs().argmax(0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    turned = vectors @ rotation(order)
    if order & (order - 1):
        return turned
    result = torch.empty_like(turned)
    # eigh sorts upwards, so the i-th largest is the i-th from the end.
    result[:, _bit_reversed(order)] = turned.flip(-1)
    return result


@lru_cache(maxsize=8)
def _bit_reversed(order: int) -> Tensor:
    """(order,) int64: every number below a power of two with its bits reversed."""
    places = torch.zeros(1, dtype=torch.long)
    while len(places) < order:
        places = torch.cat((2 * places, 2 * places + 1))
    return places


METHODS: dict[str, KVQuantizer] = {"oscar": OSCAR()}
