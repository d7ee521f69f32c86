"""AKVQ-VL: bits by attention pattern behind a Walsh-Hadamard transform (arXiv 2501.15021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    PivotDetector,
    PivotSalient,
    Plan,
    Rotate,
    Side,
    Sliding,
    TextSalient,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class AKVQVL:
    """Text at 4 bits in text-salient layers, pivots exact elsewhere, recent exact, rest 2 bits.

    Where the paper is silent: pivots are searched in the prompt only, at the input of each layer
    without text salience; clipping multiplies both ends of the range; the zero point is not
    clamped; the window counts the token being decoded. The alternatives are fields.
    """

    label: ClassVar[str] = "AKVQ-VL"
    paper: ClassVar[str] = "arXiv 2501.15021"
    needs: ClassVar[Needs] = Needs(modality=True, residual=True)
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 4, 8),
        "text_bits": (2, 4, 8),
        "group_size": (32, 64, 128),
        "recent": (0, 4, 8, 16, 32, 64, 128),
        "pivots": (0, 5, 15),
    }

    recent: int = 128
    pivots: int = 15
    clip: float = 0.8
    text_clip: float = 1.0
    bits: int = 2
    text_bits: int = 4
    group_size: int = 128
    flush_every: int = 1
    detector: PivotDetector = "tokens"
    text_layers: Literal["salient", "all", "none"] = "salient"
    pivot_layers: Literal["other", "all", "none"] = "other"
    zero: Literal["int", "float"] = "int"
    clip_mode: Literal["scale", "midpoint"] = "scale"
    rotation: Literal["hadamard", "block", "random"] = "hadamard"
    window_counts_current: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative count, an empty flush, or two codecs for the same bits.
        """
        check_fields(self)
        if self.pivots < 0 or self.group_size < 1:
            raise UserError(
                "AKVQ-VL's pivots can't be negative and its group size must be positive."
            )
        # The window checks its own numbers: here, before a model is loaded.
        Sliding(self.recent, self.window_counts_current, self.flush_every)
        if self.bits == self.text_bits:
            raise UserError("AKVQ-VL's text_bits must differ from its bits.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Two precisions behind a rotation, and the plan of the layer's attention pattern."""
        group = min(self.group_size, spec.head_dim)
        clips = {self.bits: self.clip, self.text_bits: self.text_clip}
        codecs = {
            bits: Affine(bits, group, zero=self.zero, clip=clip, clip_mode=self.clip_mode)
            for bits, clip in clips.items()
        }
        window = Sliding(self.recent, self.window_counts_current, self.flush_every)
        key, value = (
            Side(codecs, Rotate(spec.head_dim, side, self.rotation), window)
            for side in ("key", "value")
        )
        return LayerQuantizer(key, value, self._plan(spec))

    def _plan(self, spec: LayerSpec) -> Plan:
        text = self.text_layers == "all" or (self.text_layers == "salient" and spec.text_salient)
        pivots = self.pivot_layers == "all" or (
            self.pivot_layers == "other" and not spec.text_salient
        )
        plan: Plan = TextSalient(self.text_bits, self.bits) if text else Uniform(self.bits)
        return PivotSalient(self.pivots, plan, self.detector) if pivots else plan


METHODS: dict[str, KVQuantizer] = {
    "akvq_vl": AKVQVL(),
    "rtn_int2_wht_tsa": AKVQVL(pivot_layers="none", clip=1.0),
}
