"""Group quantizers: asymmetric with a float offset or an integer zero point, and symmetric.

Codes are computed with the metadata as stored (rounded to float16), so decoding is consistent.
A group whose range is negligible against its magnitude is stored as one constant; there is never a
NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kvbench.cache.contract import Packed
from kvbench.cache.fields import check_fields
from kvbench.cache.packing import check_packable, pack, unpack
from kvbench.errors import UserError

Zero = Literal["int", "float", "symmetric"]
ClipMode = Literal["scale", "midpoint"]
_HALF_MAX = 65504.0
_HALF_TINY = 2.0**-24
_ZERO_MAX = 32000.0
"""Steps between an integer zero point and the smallest value: rounded by float16 it fits int16. A
narrower group far from zero gets wider steps, still finer than float16's own."""


@dataclass(frozen=True)
class Exact:
    """Keeps states in the dtype they came in."""

    bits: int = 16
    block: int = 1

    def check(self, channels: int) -> None:
        """Anything can be kept."""

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) unchanged."""
        return (x,)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """(B, H, n, C) unchanged."""
        return packed[0]

    def bits_per_element(self, channels: int) -> float:
        """16: the widths of float16 and bfloat16 (a float32 model stores 32)."""
        return 16.0


@dataclass(frozen=True)
class Affine:
    """Round-to-nearest in groups, per token (along channels) or per channel (along tokens).

    zero="int" is F2, AKVQ-VL eq. 3-6 (float16 scale, int16 zero point, not clamped to the codes);
    zero="float" is F1, KIVI and SKVQ (float16 scale and minimum); zero="symmetric" is F4,
    SmoothQuant (float16 scale alone). `group` is a number of neighbours, or the sizes of uneven
    channel groups. `clip` multiplies both ends of the range ("scale") or shrinks it about its
    middle ("midpoint"). `metadata` "fp8" stores scale and minimum as float8 e4m3, for zero="float".
    """

    bits: int
    group: int | tuple[int, ...]
    along: Literal["channels", "tokens"] = "channels"
    zero: Zero = "int"
    clip: float = 1.0
    clip_mode: ClipMode = "scale"
    metadata: Literal["fp16", "fp8"] = "fp16"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value is out of range or of another kind.
        """
        check_fields(self)
        if not 0.0 < self.clip <= 1.0:
            raise UserError(f"clip must lie in (0, 1], not {self.clip}.")
        if isinstance(self.group, int) and self.group < 1:
            raise UserError(f"the group size must be positive, not {self.group}.")
        if self.metadata == "fp8" and self.zero != "float":
            raise UserError('fp8 metadata needs zero="float": an integer zero point is exact.')

    @property
    def block(self) -> int:
        """Tokens encoded together."""
        return self.group if self.along == "tokens" and isinstance(self.group, int) else 1

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""
        check_packable(self.bits, channels)
        if self.along == "tokens":
            return
        sizes = self.group
        if isinstance(sizes, int) and channels % sizes:
            raise UserError(
                f"{channels} channels can't be cut into groups of {sizes}; choose a group size "
                "that divides them."
            )
        if not isinstance(sizes, int) and sum(sizes) != channels:
            raise UserError(f"groups of {sum(sizes)} channels don't cover {channels} channels.")

    def bits_per_element(self, channels: int) -> float:
        """Payload plus metadata over the group: specs of the literature write b + m/g."""
        per_group = 16 if self.zero == "symmetric" else 32
        if self.metadata == "fp8":
            per_group = 16
        if isinstance(self.group, int):
            return self.bits + per_group / self.group
        return self.bits + per_group * len(self.group) / channels

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes uint8 and metadata; n must be a multiple of `block`."""
        grouped = self._grouped(x.float())
        meta = self._metadata(*self._ends(grouped))
        codes = self._codes(grouped, [self._spread(m).float() for m in meta])
        if self._even:
            codes = codes.flatten(-2)
        if self.metadata == "fp8":
            meta = tuple(m.view(torch.uint8) for m in meta)  # few operations know float8
        return pack(codes, self.bits), *meta

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and metadata to (B, H, n, C)."""
        codes, meta = unpack(packed[0], self.bits), packed[1:]
        if self.metadata == "fp8":
            meta = tuple(m.view(torch.float8_e4m3fn).float() for m in meta)
        grouped = codes.unflatten(-1, (-1, self.group)) if self._even else codes
        scale, *offset = map(self._spread, meta)
        steps = grouped.float()
        if self.zero == "symmetric":
            values = steps.sub_(2 ** (self.bits - 1)).mul_(scale)
        elif self.zero == "int":
            values = steps.sub_(offset[0]).mul_(scale)
        else:
            values = steps.mul_(scale).add_(offset[0])
        if self.along == "tokens":
            values = values.flatten(2, 3)
        return (values.flatten(-2) if self._even else values).to(dtype)

    @property
    def _levels(self) -> int:
        return int(2**self.bits - 1)

    @property
    def _even(self) -> bool:
        return self.along == "channels" and isinstance(self.group, int)

    def _grouped(self, x: Tensor) -> Tensor:
        """(B, H, n, C) with groups along a dimension of their own, if they are all of one size."""
        if self.along == "tokens":
            return x.unflatten(2, (-1, self.block))
        return x.unflatten(-1, (-1, self.group)) if isinstance(self.group, int) else x

    def _ends(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of every group, shaped like the metadata."""
        if self.along == "tokens":
            return torch.aminmax(grouped, dim=3)
        if isinstance(self.group, int):
            return torch.aminmax(grouped, dim=-1)
        index = _group_of_channel(self.group, grouped.device).expand(grouped.shape)
        empty = grouped.new_zeros(*grouped.shape[:-1], len(self.group))
        low = empty.scatter_reduce(-1, index, grouped, "amin", include_self=False)
        return low, empty.scatter_reduce(-1, index, grouped, "amax", include_self=False)

    def _spread(self, meta: Tensor) -> Tensor:
        """Metadata of groups, broadcastable to `_grouped`."""
        if self.along == "tokens":
            return meta.unsqueeze(3)
        if isinstance(self.group, int):
            return meta.unsqueeze(-1)
        return meta.index_select(-1, _group_of_channel(self.group, meta.device))

    def _metadata(self, low: Tensor, high: Tensor) -> Packed:
        if self.zero == "symmetric":
            largest = torch.maximum(low.abs(), high.abs())
            # SmoothQuant floors absmax at 1e-5; a zero group must decode to zero all the same.
            step = largest.clamp_min(1e-5) * self.clip / max(2 ** (self.bits - 1) - 1, 1)
            return (step.clamp(_HALF_TINY, _HALF_MAX).half(),)
        clipped_low, clipped_high = self._clipped(low, high)
        scale = self._rounded((clipped_high - clipped_low) / self._levels).float()
        constant = scale == 0
        if self.zero == "int":
            scale = torch.maximum(scale, clipped_low.abs() / _ZERO_MAX)
            scale = scale.clamp_max(_HALF_MAX).half()
            zero = torch.round(clipped_low / -scale.float())
        # Constants are rare, and on a CPU it is cheaper to look for them than to fill them in.
        if constant.is_cpu and not bool(constant.any()):
            if self.zero == "int":
                return scale, zero.clamp(-32768, 32767).to(torch.int16)
            return self._rounded(scale), self._rounded(clipped_low)
        middle = (low / 2 + high / 2).clamp(-_HALF_MAX, _HALF_MAX)
        if self.zero == "float":
            offset = torch.where(constant, middle, clipped_low)
            return self._rounded(scale.masked_fill(constant, 1.0)), self._rounded(offset)
        # A constant v is scale |v|, zero point -sign(v), code 0.
        size = middle.half().abs()
        scale = torch.where(constant, size.masked_fill(size == 0, 1.0), scale)
        zero = torch.where(constant, -middle.half().sign(), zero)
        return scale, zero.clamp(-32768, 32767).to(torch.int16)

    def _clipped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.clip == 1.0:
            return low, high
        if self.clip_mode == "scale":
            return low * self.clip, high * self.clip
        middle, half = low / 2 + high / 2, (high / 2 - low / 2) * self.clip
        return middle - half, middle + half

    def _rounded(self, meta: Tensor) -> Tensor:
        if self.metadata == "fp8":
            return meta.clamp(-448, 448).to(torch.float8_e4m3fn)
        return meta.clamp(-_HALF_MAX, _HALF_MAX).half()

    def _codes(self, x: Tensor, meta: list[Tensor]) -> Tensor:
        scale = meta[0]
        if self.zero == "symmetric":
            half = 2 ** (self.bits - 1)
            return (torch.round(x / scale).clamp(-half, half - 1) + half).to(torch.uint8)
        if self.zero == "int":
            codes = torch.round(x / scale) + meta[1]
            return codes.clamp(0, self._levels).to(torch.uint8)
        return torch.round((x - meta[1]) / scale).clamp(0, self._levels).to(torch.uint8)


@lru_cache(maxsize=512)
def _group_of_channel(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(C,) int64, the group that each channel belongs to."""
    groups = torch.arange(len(sizes), device=device)
    return groups.repeat_interleave(torch.tensor(sizes, device=device))
