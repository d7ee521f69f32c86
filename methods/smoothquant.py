"""SmoothQuant's channel scaling on cached keys and values (arXiv 2211.10438; AKVQ-VL, IV-A3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kvbench.cache import (
    Affine,
    Calibration,
    ChannelScale,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Side,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError

_FLOOR = 1e-5


@dataclass(frozen=True)
class SmoothQuant:
    """Each channel is divided by s before round-to-nearest, and the other factor multiplied by it.

    Keys: s = absmax|K|^alpha / absmax|Q|^(1-alpha); values: s = absmax|V|^alpha /
    max|W_O|^(1-alpha); factors and s are floored at 1e-5 as in the official code. The official
    method never touches the cache; this is the pairing that SKVQ's code uses for it, without its
    two defects (keys multiplied instead of divided; every layer scaled by the last layer's
    statistic).
    """

    label: ClassVar[str] = "SmoothQuant"
    paper: ClassVar[str] = "arXiv 2211.10438"
    needs: ClassVar[Needs] = Needs(
        statistics=("key_absmax", "query_absmax", "value_absmax", "output_weight_absmax")
    )

    bits: int = 2
    group_size: int = 128
    alpha: float = 0.5
    zero: Literal["int", "float"] = "int"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: alpha outside [0, 1].
        """
        check_fields(self)
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"SmoothQuant's alpha must lie in [0, 1], not {self.alpha}.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Round-to-nearest behind calibrated channel scales."""
        if calibration is None:
            raise UserError("SmoothQuant needs calibrated statistics; run `kvbench calibrate`.")
        codec = Affine(self.bits, min(self.group_size, spec.head_dim), zero=self.zero)
        key, value = (
            Side(
                {self.bits: codec},
                ChannelScale(
                    self._scale(calibration.of(x, spec.index), calibration.of(y, spec.index))
                ),
            )
            for x, y in (("key_absmax", "query_absmax"), ("value_absmax", "output_weight_absmax"))
        )
        return LayerQuantizer(key, value, Uniform(self.bits))

    def _scale(self, states: Tensor, partner: Tensor) -> Tensor:
        """(H, D) from two (H, D) largest magnitudes."""
        ratio = states.clamp_min(_FLOOR) ** self.alpha
        return (ratio / partner.clamp_min(_FLOOR) ** (1 - self.alpha)).clamp_min(_FLOOR)


METHODS: dict[str, KVQuantizer] = {"smoothquant": SmoothQuant()}
