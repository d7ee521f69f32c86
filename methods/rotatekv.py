"""RotateKV: keys rotated over several heads before RoPE, reordered, pivots exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    MergeHeads,
    Needs,
    PivotSalient,
    Rotate,
    Rounding,
    Side,
    Transform,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


class HeadGroups(Transform):
    """Groups of neighbouring heads times one Hadamard matrix; undone on the way into attention."""

    def __init__(self, heads: int, head_dim: int) -> None:
        """Of `heads` heads of `head_dim` channels."""
        self._heads = heads
        # Its `attend`, made for values, is the inverse.
        self._rotate = Rotate(heads * head_dim, "value")

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D), the same shape."""
        return self._apart(self._rotate.store(self._together(x)))

    def read(self, x: Tensor) -> Tensor:
        """(B, H, n, D), the same shape."""
        return self._apart(self._rotate.attend(self._together(x)))

    def _together(self, x: Tensor) -> Tensor:
        """(B, H, n, D) to (B, H / heads, n, heads · D)."""
        return x.unflatten(1, (-1, self._heads)).transpose(2, 3).flatten(3)

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(3, (self._heads, -1)).transpose(2, 3).flatten(1, 2)


class _SquaredRounding(Rounding):
    """Steps of range / (bits² − 1), codes up to 2^bits − 1."""

    @property
    def levels(self) -> int:
        return self.bits**2 - 1

    def encode(self, x: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        return super().encode(x, scale, *zero).clamp_max(2**self.bits - 1)


class SquaredDivisor(Affine):
    """What the released code makes of 3 bits; at 2 and 4 bits bits² is 2^bits."""

    @property
    def rounding(self) -> Rounding:
        """As its parent's but for the divisor."""
        return _SquaredRounding(**vars(super().rounding))


@dataclass(frozen=True)
class RotateKV:
    """Round-to-nearest of rotated states, every token at once, prompt tokens with pivots exact.

    Keys before RoPE: groups of `heads` heads times H/√(heads · D), then all channels sorted by
    their calibrated sum. Values: each head times H/√D. Pivots: the tokens of the `pivots` largest
    elements of the residual stream that enters the layer; several may be one token's. A `clip` of
    None is the authors': 0.8 at 2 bits, 1.0 at more.

    Where the number of key/value heads isn't a multiple of `heads`, the largest power of two that
    divides it is taken (3 heads: each alone). Deviations from the released code: it sorts by
    sums over the evaluated text, here over data that no task scores; each token's own position
    under padding and M-RoPE; a constant group is exact instead of NaN. `compat_divisor` divides
    the range by bits² − 1 as the code does, which is 8 for its 3-bit results.
    """

    label: ClassVar[str] = "RotateKV"
    paper: ClassVar[str] = "arXiv 2501.16383"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 3, 4),
        "group_size": (32, 64, 128),
        "pivots": (0, 2, 5, 10, 20),
    }

    bits: int = 2
    group_size: int = 128
    clip: float | None = None
    pivots: int = 20
    heads: int = 4
    reorder: bool = True
    compat_divisor: bool = False

    @property
    def needs(self) -> Needs:
        """The residual stream, and the mean of every channel if channels are reordered."""
        return Needs(residual=True, statistics=("key_mean",) if self.reorder else ())

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative count, heads that are no power of two, or bits without a code.
        """
        check_fields(self)
        if self.pivots < 0 or self.group_size < 1:
            raise UserError(
                "RotateKV's pivots can't be negative and its group size must be positive."
            )
        if self.heads < 1 or self.heads & (self.heads - 1):
            raise UserError(f"RotateKV's heads must be a power of two, not {self.heads}.")
        if self.compat_divisor and self.bits not in (2, 3, 4):
            raise UserError("compat_divisor is for 2, 3 and 4 bits.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One codec behind two rotations, and pivots."""
        kind = SquaredDivisor if self.compat_divisor and self.bits == 3 else Affine
        clip = (0.8 if self.bits == 2 else 1.0) if self.clip is None else self.clip
        codec = kind(self.bits, min(self.group_size, spec.head_dim), clip=clip)
        groups = HeadGroups(_dividing(self.heads, spec.num_kv_heads), spec.head_dim)
        turn: Transform = groups
        if self.reorder:
            turn = MergeHeads(spec, self._order(spec, calibration, groups), groups)
        key = Side({self.bits: codec}, turn, pre_rope=True)
        value = Side({self.bits: codec}, Rotate(spec.head_dim, "value"))
        return LayerQuantizer(key, value, PivotSalient(self.pivots, Uniform(self.bits), "elements"))

    def _order(
        self, spec: LayerSpec, calibration: Calibration | None, groups: HeadGroups
    ) -> Tensor:
        if calibration is None:
            raise UserError(
                "RotateKV needs calibrated statistics; run `kvbench calibrate` or set "
                "reorder=false."
            )
        # The mean of rotated keys is the rotated mean.
        mean = calibration.of("key_mean", spec.index).double()
        return groups.store(mean[None, :, None]).flatten().argsort(stable=True)


def _dividing(most: int, heads: int) -> int:
    """The largest power of two up to `most` that divides `heads`."""
    while heads % most:
        most //= 2
    return most


METHODS: dict[str, KVQuantizer] = {"rotatekv": RotateKV()}
