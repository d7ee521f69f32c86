"""Round-to-nearest in groups: metadata, codes and numbers, in plain torch.

Everything is computed in float32, every operation rounded on its own, so that Triton kernels can
give the same bits (`kvbench.kernels.rounding_triton`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvbench.kernels.states import Along, Zero

ClipMode = Literal["scale", "midpoint"]
_HALF_MAX = 65504.0
_HALF_TINY = 2.0**-24
_ZERO_MAX = 32000.0
"""Steps between an integer zero point and the smallest value: rounded by float16 it fits int16. A
narrower group far from zero gets wider steps, still finer than float16's own."""


@dataclass(frozen=True)
class Rounding:
    """How groups of numbers become codes of `bits` bits; `kvbench.cache.Affine` has the formulas.

    `float8` rounds scale and minimum to float8 e4m3 instead of float16; zero="float" only.
    """

    bits: int
    group: int
    along: Along
    zero: Zero
    clip: float = 1.0
    clip_mode: ClipMode = "scale"
    float8: bool = False

    @property
    def levels(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def metadata(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """Scale and, unless "symmetric", zero of groups from their float32 ends; any shape."""
        if self.zero == "symmetric":
            largest = torch.maximum(low.abs(), high.abs())
            # SmoothQuant floors absmax at 1e-5; a zero group must decode to zero all the same.
            step = largest.clamp_min(1e-5) * self.clip
            step = _over(step, max(2 ** (self.bits - 1) - 1, 1))
            return (step.clamp(_HALF_TINY, _HALF_MAX).half(),)
        clipped_low, clipped_high = self._clipped(low, high)
        scale = self._rounded(_over(clipped_high - clipped_low, self.levels)).float()
        constant = scale == 0
        if self.zero == "int":
            scale = torch.maximum(scale, _over(clipped_low.abs(), _ZERO_MAX))
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

    def encode(self, x: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        """Float32 numbers to uint8 codes, one a byte; float32 metadata broadcasts against them."""
        if self.zero == "symmetric":
            half = 2 ** (self.bits - 1)
            return (torch.round(x / scale).clamp(-half, half - 1) + half).to(torch.uint8)
        if self.zero == "int":
            codes = torch.round(x / scale) + zero[0]
            return codes.clamp(0, self.levels).to(torch.uint8)
        return torch.round((x - zero[0]) / scale).clamp(0, self.levels).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        """Codes of any integer dtype to float32 numbers; metadata broadcasts against them."""
        steps = codes.float()
        if self.zero == "symmetric":
            return steps.sub_(2 ** (self.bits - 1)).mul_(scale)
        if self.zero == "int":
            return steps.sub_(zero[0]).mul_(scale)
        return steps.mul_(scale).add_(zero[0])

    def _clipped(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.clip == 1.0:
            return low, high
        if self.clip_mode == "scale":
            return low * self.clip, high * self.clip
        middle, half = low / 2 + high / 2, (high / 2 - low / 2) * self.clip
        return middle - half, middle + half

    def _rounded(self, meta: Tensor) -> Tensor:
        if self.float8:
            return meta.clamp(-448, 448).to(torch.float8_e4m3fn)
        return meta.clamp(-_HALF_MAX, _HALF_MAX).half()


def _over(x: Tensor, number: float) -> Tensor:
    """A quotient: CUDA would multiply by the reciprocal of a plain number."""
    return x / (x.new_full((), number) if x.is_cuda else number)
