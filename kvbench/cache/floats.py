"""Numbers kept as 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbench.cache.contract import Packed

_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8:
    """x / s rounded to the nearest 8-bit float, even on a tie, saturating at its largest number.

    `scale` None: s = max(max|x| / largest, 1e-6) of each vector, kept as float32. Otherwise s is
    this one number. `kind` "e4m3" is e4m3fn (largest 448), "e5m2" reaches 57,344.
    """

    scale: float | None = None
    kind: Literal["e4m3", "e5m2"] = "e4m3"
    bits: int = 8
    block: int = 1

    def check(self, channels: int) -> None:
        """Vectors of any length can be kept."""

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to bytes (B, H, n, C) and, without a fixed scale, scales (B, H, n, 1)."""
        wide, largest = x.float(), torch.finfo(_KINDS[self.kind]).max
        meta: Packed = ()
        if self.scale is None:
            scale = (wide.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-6)
            wide, meta = wide / scale, (scale,)
        else:
            wide = wide / self.scale
        # A plain cast makes NaN of what is too large.
        codes = wide.clamp(-largest, largest).to(_KINDS[self.kind])
        return codes.view(torch.uint8), *meta

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Bytes and scales to (B, H, n, C)."""
        scale = packed[1] if self.scale is None else self.scale
        return (packed[0].view(_KINDS[self.kind]).float() * scale).to(dtype)

    def bits_per_element(self, channels: int) -> float:
        """8, and 32 bits of scale for each vector."""
        return 8 + (32 / channels if self.scale is None else 0)
