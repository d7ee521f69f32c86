"""Round-to-nearest: the baseline of every table, alone and with the first steps of AKVQ-VL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    MergeHeads,
    Needs,
    Rotate,
    Side,
    Transform,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class RTN:
    """Every token at the same bits, per token and head, no window, no exact token.

    `zero` picks the integer zero point of AKVQ-VL (eq. 3-6) or a float offset; `hadamard` rotates
    keys, queries and values first (Table III, "+ WHT"); `group_over_heads` lets groups run over the
    flattened heads of a token, as SKVQ's code does.
    """

    label: ClassVar[str] = "RTN"
    paper: ClassVar[str] = "-"
    needs: ClassVar[Needs] = Needs()

    bits: int = 2
    group_size: int = 128
    zero: Literal["int", "float"] = "int"
    clip: float = 1.0
    hadamard: bool = False
    group_over_heads: bool = False

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value of another kind, or two transforms at once.
        """
        check_fields(self)
        if self.hadamard and self.group_over_heads:
            raise UserError("RTN can rotate heads or group over them, not both.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One codec for keys and values."""
        width = spec.head_dim * (spec.num_kv_heads if self.group_over_heads else 1)
        codec = Affine(self.bits, min(self.group_size, width), zero=self.zero, clip=self.clip)
        key, value = (
            Side({self.bits: codec}, self._transform(spec, side)) for side in ("key", "value")
        )
        return LayerQuantizer(key, value, Uniform(self.bits))

    def _transform(self, spec: LayerSpec, side: str) -> Transform:
        if self.hadamard:
            return Rotate(spec.head_dim, side)
        return MergeHeads(spec) if self.group_over_heads else Transform()


METHODS: dict[str, KVQuantizer] = {
    "rtn_int4": RTN(bits=4),
    "rtn_int2": RTN(bits=2),
    "rtn_int2_wht": RTN(bits=2, hadamard=True),
}
