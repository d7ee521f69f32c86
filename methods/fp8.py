"""FP8: every number an 8-bit float, the safe default that fewer bits are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvbench.cache import (
    Calibration,
    Float8,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Side,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class FP8:
    """x / s as e4m3 (or e5m2), for every token, keys after RoPE; no window, no transform.

    `static=0` gives each token and head a float32 scale of its own, max|x| / 448, floored at 1e-6:
    vLLM's `fp8_per_token_head`. Any other number is the one scale of all keys and values, as of
    vLLM's `fp8` (`static=1.0` where a checkpoint brings no scales), and what exceeds 448 of it
    saturates. Deviations: storage only, neither the query nor the two products of attention are in
    FP8; no scales from a checkpoint; all layers alike, also those with a sliding window.
    """

    label: ClassVar[str] = "FP8"
    paper: ClassVar[str] = "vLLM fp8"
    needs: ClassVar[Needs] = Needs()

    static: float = 0.0
    kind: Literal["e4m3", "e5m2"] = "e4m3"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative scale, or another kind of value.
        """
        check_fields(self)
        if self.static < 0:
            raise UserError(f"FP8's static scale can't be negative ({self.static}).")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One codec for everything."""
        side = Side({8: Float8(self.static or None, self.kind)})
        return LayerQuantizer(side, side, Uniform(8))


METHODS: dict[str, KVQuantizer] = {"fp8": FP8()}
