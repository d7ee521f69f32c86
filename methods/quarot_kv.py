"""QuaRot's cache: 4 bits behind a Hadamard rotation of each head (arXiv 2404.00456)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Rotate,
    Side,
    Uniform,
    check_fields,
)


@dataclass(frozen=True)
class QuaRotKV:
    """Queries, keys (after RoPE) and values times H/√D, then round-to-nearest per token and head.

    Defaults are the simulation behind the paper's tables: asymmetric with an integer zero point,
    clip 0.95. `zero="float", clip=1.0` is the INT4 cache of its kernels, `zero="symmetric"` the
    code's own default. Every token at once, no window. Deviations: the cache's part of QuaRot
    alone, the rest of the model is not rotated; values are turned back with the same H, where the
    code mixes heads on the way into W_O (no difference to what is stored); the simulated range of a
    key always holds zero, here only if its numbers do, which after the rotation they nearly always
    do; a constant group is exact, where the code divides by zero.
    """

    label: ClassVar[str] = "QuaRot-KV"
    paper: ClassVar[str] = "arXiv 2404.00456"
    needs: ClassVar[Needs] = Needs()

    bits: int = 4
    group_size: int = 128
    clip: float = 0.95
    zero: Literal["int", "float", "symmetric"] = "int"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value of another kind.
        """
        check_fields(self)

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One codec behind a rotation on either side."""
        group = min(self.group_size, spec.head_dim)
        codec = Affine(self.bits, group, zero=self.zero, clip=self.clip)
        key, value = (
            Side({self.bits: codec}, Rotate(spec.head_dim, side)) for side in ("key", "value")
        )
        return LayerQuantizer(key, value, Uniform(self.bits))


METHODS: dict[str, KVQuantizer] = {"quarot_kv": QuaRotKV()}
