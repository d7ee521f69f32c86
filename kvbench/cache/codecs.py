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
from kvbench.errors import UserError
from kvbench.kernels.packing import WIDTHS, pack, unpack
from kvbench.kernels.quantize import dequantize, quantize
from kvbench.kernels.rounding import ClipMode, Rounding
from kvbench.kernels.states import Along, PackedStates, Zero


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
    SmoothQuant (float16 scale alone). `group` is a number of neighbours, the sizes of uneven
    channel groups, or None: along tokens, all that a row is written at once. `clip` multiplies both
    ends of the range ("scale") or shrinks it about its middle ("midpoint"). `metadata` "fp8" stores
    scale and minimum as float8 e4m3, for zero="float".
    """

    bits: int
    group: int | tuple[int, ...] | None
    along: Along = "channels"
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
        if self.along == "tokens" and isinstance(self.group, tuple):
            raise UserError("groups along tokens have one size; give a number, not a list.")
        if self.along == "channels" and self.group is None:
            raise UserError("groups along channels need a size.")

    @property
    def block(self) -> int | None:
        """Tokens encoded together."""
        return 1 if isinstance(self.group, tuple) or self.along == "channels" else self.group

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
        if isinstance(sizes, tuple) and sum(sizes) != channels:
            raise UserError(f"groups of {sum(sizes)} channels don't cover {channels} channels.")

    def bits_per_element(self, channels: int) -> float:
        """Payload plus metadata over the group: specs of the literature write b + m/g.

        What all tokens of a write share counts as nothing.
        """
        if self.group is None:
            return float(self.bits)
        per_group = 16 if self.zero == "symmetric" else 32
        if self.metadata == "fp8":
            per_group = 16
        if isinstance(self.group, int):
            return self.bits + per_group / self.group
        return self.bits + per_group * len(self.group) / channels

    @property
    def is_even(self) -> bool:
        """Whether kernels can read what is stored: groups of one size, float16 metadata."""
        return isinstance(self.group, int) and self.metadata == "fp16"

    def states(self, packed: Packed) -> PackedStates:
        """What `encode` gave as kernels take it; only for groups of one size."""
        codes, scale, *zero = packed
        codes = codes.flatten(2, 3) if self._deep else codes
        group = self.group if isinstance(self.group, int) else 0
        return PackedStates(codes, scale, zero[0] if zero else None, self.bits, group, self.along)

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes uint8 and metadata; n must be a multiple of `block`, if any."""
        if isinstance(self.group, int):
            states = quantize(x, self.rounding)
            codes = states.codes.unflatten(2, (-1, self.group)) if self._deep else states.codes
            meta = tuple(part for part in (states.scale, states.zero) if part is not None)
        elif self.group is None:
            meta = self.rounding.metadata(*torch.aminmax(x.float(), dim=2, keepdim=True))
            spread = (part.float() for part in meta)
            codes = pack(self.rounding.encode(x.float(), *spread), self.bits)
        else:
            codes, meta = self._encode_uneven(x.float(), self.group)
        if self.metadata == "fp8":
            meta = tuple(part.view(torch.uint8) for part in meta)  # few operations know float8
        return codes, *meta

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and metadata to (B, H, n, C)."""
        codes, meta = packed[0], packed[1:]
        if self.metadata == "fp8":
            meta = tuple(part.view(torch.float8_e4m3fn).float() for part in meta)
        if isinstance(self.group, int):
            return dequantize(self.states((codes, *meta)), dtype)
        spread = meta
        if self.group is not None:
            group = _group_of_channel(self.group, codes.device)
            spread = tuple(part.index_select(-1, group) for part in meta)
        return self.rounding.decode(unpack(codes, self.bits), *spread).to(dtype)

    @property
    def rounding(self) -> Rounding:
        """The same in the kernels' terms; group 0 stands for what they can't read."""
        group = self.group if isinstance(self.group, int) else 0
        float8 = self.metadata == "fp8"
        return Rounding(self.bits, group, self.along, self.zero, self.clip, self.clip_mode, float8)

    @property
    def _deep(self) -> bool:
        """Whether codes have a dimension for the tokens of a block."""
        return self.along == "tokens"

    def _encode_uneven(self, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Packed]:
        """Codes and metadata of float32 states in groups of such sizes."""
        group = _group_of_channel(sizes, x.device)
        empty = x.new_zeros(*x.shape[:-1], len(sizes))
        low, high = (
            empty.scatter_reduce(-1, group.expand(x.shape), x, end, include_self=False)
            for end in ("amin", "amax")
        )
        meta = self.rounding.metadata(low, high)
        spread = (part.float().index_select(-1, group) for part in meta)
        return pack(self.rounding.encode(x, *spread), self.bits), meta


def check_packable(bits: int, length: int) -> None:
    """Raise UserError unless `length` codes of `bits` bits fill whole bytes."""
    if bits not in WIDTHS:
        raise UserError(f"{bits}-bit codes can't be packed; use one of {WIDTHS} bits.")
    if length * bits % 8:
        raise UserError(
            f"{length} channels of {bits} bits don't fill whole bytes; use more bits or another "
            "group layout."
        )


@lru_cache(maxsize=512)
def _group_of_channel(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(C,) int64, the group that each channel belongs to."""
    groups = torch.arange(len(sizes), device=device)
    return groups.repeat_interleave(torch.tensor(sizes, device=device))
