"""NVFP4: 4-bit floats in blocks of 16 with a float8 scale, under one scale a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.cache import (
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Packed,
    Side,
    Uniform,
    check_fields,
    pack,
    unpack,
)
from kvbench.errors import UserError

BLOCK = 16
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of e2m1, by their three low bits; the fourth is the sign."""
_LARGEST_SCALE = 448.0


@dataclass(frozen=True)
class Float4:
    """e2m1 codes of x / (s t): s an e4m3 scale a block of 16 channels, t one number for all.

    Codes are rounded to the nearest, ties to the even code, and saturate at 6. Two stand in a byte,
    in planes (`kvbench.kernels.packing`): channel c beside c + C / 2, where GPUs put neighbours.
    A block whose scale rounds to zero is zero.
    """

    scale: float
    bits: int = 4
    block: int = 1

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""
        if channels % BLOCK:
            raise UserError(
                f"NVFP4 scales blocks of {BLOCK} channels, and {channels} can't be cut into such; "
                "use fp8 or rtn_int4 on this model."
            )

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes (B, H, n, C / 2) and scales (B, H, n, C / 16), both uint8."""
        blocks = (x.float() / self.scale).unflatten(-1, (-1, BLOCK))
        wanted = blocks.abs().amax(-1) / LEVELS[-1]
        scale = wanted.clamp_max(_LARGEST_SCALE).to(torch.float8_e4m3fn)
        steps = scale.float()[..., None]
        scaled = torch.where(steps > 0, blocks / steps.clamp_min(2.0**-9), 0.0)
        codes = torch.bucketize(scaled.abs(), _edges(x.device)) + 8 * scaled.signbit()
        return pack(codes.flatten(-2).to(torch.uint8), 4), scale.view(torch.uint8)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and scales to (B, H, n, C)."""
        codes = unpack(packed[0], 4).unflatten(-1, (-1, BLOCK)).long()
        levels = torch.tensor(LEVELS, device=codes.device)
        numbers = torch.cat((levels, -levels))[codes]
        steps = packed[1].view(torch.float8_e4m3fn).float()[..., None]
        return (numbers * steps * self.scale).flatten(-2).to(dtype)

    def bits_per_element(self, channels: int) -> float:
        """4, and 8 bits of scale for each block; the one number of the layer is not counted."""
        return 4 + 8 / BLOCK


def _edges(device: torch.device) -> Tensor:
    """Upper ends of the first seven levels; a tie goes to the even code."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(LEVELS)])
    odd = torch.arange(7) % 2 == 1
    return torch.where(odd, torch.nextafter(middles, torch.zeros(7)), middles).to(device)


@dataclass(frozen=True)
class NVFP4:
    """Keys (after RoPE) and values as e2m1 in blocks of 16 channels; every token, no transform.

    `static=0`: the scale of a layer's keys, and that of its values, is calibrated, max|x| / 448 as
    FlashInfer's cache kernels have it (weights use max|x| / (448 · 6)); what was larger than in
    calibration still has six times of headroom. Any other number is the scale itself (vLLM without
    scales in the checkpoint: 1.0). Deviations: bytes are real but arithmetic is emulated, nothing
    is rounded to FP8 on the way into attention; the scales of blocks lie in order, not interleaved
    as one generation of GPUs wants them.
    """

    label: ClassVar[str] = "NVFP4"
    paper: ClassVar[str] = "NVIDIA, Dec 2025"

    static: float = 0.0

    @property
    def needs(self) -> Needs:
        """The largest magnitudes, unless the scale is given."""
        return Needs(statistics=() if self.static else ("key_absmax", "value_absmax"))

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative scale, or another kind of value.
        """
        check_fields(self)
        if self.static < 0:
            raise UserError(f"NVFP4's static scale can't be negative ({self.static}).")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Two codecs that differ in their scale."""
        key, value = (
            Side({4: Float4(self._scale(spec, calibration, name))}) for name in ("key", "value")
        )
        return LayerQuantizer(key, value, Uniform(4))

    def _scale(self, spec: LayerSpec, calibration: Calibration | None, name: str) -> float:
        if self.static:
            return self.static
        if calibration is None:
            raise UserError(
                "NVFP4 needs calibrated statistics; run `kvbench calibrate` or set static=1.0."
            )
        scale = float(calibration.of(f"{name}_absmax", spec.index).max()) / _LARGEST_SCALE
        if not math.isfinite(scale):
            raise UserError(f"the calibrated {name}_absmax is not finite; calibrate again.")
        return scale or 1.0


METHODS: dict[str, KVQuantizer] = {"nvfp4": NVFP4()}
