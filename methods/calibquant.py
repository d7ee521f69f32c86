"""CalibQuant: vision tokens at one bit a channel, their logits remapped (arXiv 2502.14882)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import (
    EXACT,
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    LogitMap,
    Needs,
    Side,
    TextSalient,
    check_fields,
)


@dataclass(frozen=True)
class CalibQuant:
    """Keys (after RoPE) and values of vision tokens per channel, one range for all of a prompt.

    At one bit the two levels of a channel are `key_shrink` (`value_shrink`) times its smallest and
    largest number; with more bits the range is whole. All other tokens, and those generated, stay
    in 16 bits. With `calibrate`, at one and two bits, a query's logits on vision tokens are mapped
    from [min, max] to [min, max − `lowered`] before softmax, against the inflated top logits of
    coarse keys.

    Deviations from the released code: ranges are float16 and codes made with them as stored; all
    images of a prompt share a range wherever they stand, where the code takes one contiguous block;
    the extremes of the logits are over the tokens that a query sees; where max − min is less than
    `lowered`, all logits become the minimum instead of changing their order; codes are packed in
    this tool's order. The remap is no change of basis, and no decode kernel has it.
    """

    label: ClassVar[str] = "CalibQuant"
    paper: ClassVar[str] = "arXiv 2502.14882"
    needs: ClassVar[Needs] = Needs(modality=True)

    bits: Literal[1, 2, 4] = 1
    key_shrink: float = 0.5
    value_shrink: float = 0.3
    calibrate: bool = True
    lowered: float = 3.0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value of another kind, or a range that is shrunk to nothing.
        """
        check_fields(self)
        self._codec(self.key_shrink)
        self._codec(self.value_shrink)

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Two codecs for vision tokens, and what becomes of their logits."""
        maps: dict[int, LogitMap] = {}
        if self.calibrate and self.bits <= 2:
            maps[self.bits] = self._remapped
        return LayerQuantizer(
            Side({self.bits: self._codec(self.key_shrink)}),
            Side({self.bits: self._codec(self.value_shrink)}),
            TextSalient(EXACT, self.bits),
            logit_maps=maps,
        )

    def _codec(self, shrink: float) -> Affine:
        clip = shrink if self.bits == 1 else 1.0
        return Affine(self.bits, None, along="tokens", zero="float", clip=clip)

    def _remapped(self, logits: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, Hq, n, T), changed where the (B, 1, n, T) mask is True."""
        wide = logits.float() if logits.dtype.itemsize < 4 else logits
        low = wide.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
        high = wide.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
        span = high - low
        slope = (span - self.lowered).clamp_min(0) / (span + 1e-8)
        return torch.where(mask, (wide - low) * slope + low, wide).to(logits.dtype)


METHODS: dict[str, KVQuantizer] = {
    "calibquant": CalibQuant(),
}
