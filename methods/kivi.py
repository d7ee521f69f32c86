"""KIVI: keys per channel, values per token, the newest tokens exact (arXiv 2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Residual,
    Side,
    Sliding,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class KIVI:
    """Keys in groups of tokens of one channel, values in groups of channels of one token.

    Exact tokens: the last `length mod residual` keys and the last `residual` values, besides the
    token being decoded. `prompt_residual=False` keeps prompt tokens exact only where they don't
    fill a group of keys. Deviations from the official code: scale and minimum are float16 whatever
    the model's dtype (both round them before codes are made), a constant channel is stored exactly
    instead of becoming NaN, and padding never enters a group.
    """

    label: ClassVar[str] = "KIVI"
    paper: ClassVar[str] = "arXiv 2402.02750"
    needs: ClassVar[Needs] = Needs()
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 4, 8),
        "group_size": (16, 32, 64, 128),
        "residual": (16, 32, 64, 128),
        "prompt_residual": (True, False),
    }

    bits: int = 2
    group_size: int = 128
    residual: int = 128
    prompt_residual: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: groups of keys would straddle a flush.
        """
        check_fields(self)
        if self.group_size < 1 or self.residual % self.group_size:
            raise UserError(
                f"KIVI's residual ({self.residual}) must be a multiple of its group size "
                f"({self.group_size})."
            )

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Per-channel keys, per-token values."""
        along_tokens = Affine(self.bits, self.group_size, along="tokens", zero="float")
        along_channels = Affine(self.bits, min(self.group_size, spec.head_dim), zero="float")
        prompt_block = None if self.prompt_residual else self.group_size
        key = Side(
            {self.bits: along_tokens}, window=Residual(self.residual, prompt_block=prompt_block)
        )
        window = Sliding(self.residual, counts_current=False, prompt=self.prompt_residual)
        value = Side({self.bits: along_channels}, window=window)
        return LayerQuantizer(key, value, Uniform(self.bits))


METHODS: dict[str, KVQuantizer] = {"kivi": KIVI()}
