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
    clamped; the window counts the token being decoded. The alternatives are fields. A `clip` (of
    `bits`) or `text_clip` (of `text_bits`) of None is the paper's: 0.8 at 2 bits, 1.0 at more.
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
    clip: float | None = None
    text_clip: float | None = None
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
        clips, mode = {self.bits: self.clip, self.text_bits: self.text_clip}, self.clip_mode
        codecs = {
            bits: Affine(bits, group, zero=self.zero, clip=_clip(bits, clip), clip_mode=mode)
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


def _clip(bits: int, given: float | None) -> float:
    return (0.8 if bits == 2 else 1.0) if given is None else given


METHODS: dict[str, KVQuantizer] = {
    "akvq_vl": AKVQVL(),
    "rtn_int2_wht_tsa": AKVQVL(pivot_layers="none", clip=1.0),
}
