"""The uncompressed cache: the baseline every method is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvbench.cache import (
    EXACT,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Side,
    Uniform,
)


@dataclass(frozen=True)
class FP16:
    """Every token exact, in the model's own dtype."""

    label: ClassVar[str] = "FP16"
    paper: ClassVar[str] = "-"
    needs: ClassVar[Needs] = Needs()

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """No codec: the plan asks for none."""
        return LayerQuantizer(Side(), Side(), Uniform(EXACT))


METHODS: dict[str, KVQuantizer] = {"fp16": FP16()}
