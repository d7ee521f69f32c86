"""AKVQ-VL: bits by attention pattern behind a Walsh-Hadamard transform (arXiv 2501.15021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import (
    EXACT,
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Plan,
    Rotate,
    Side,
    Sliding,
    Tokens,
    Uniform,
    check_fields,
    filled,
)
from kvbench.errors import UserError

Detector = Literal["tokens", "elements", "threshold"]


@dataclass(frozen=True)
class TextSalient:
    """Text tokens get more bits than vision tokens (section III-B1)."""

    text: int
    rest: int

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return self.generated(tokens)

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        bits = filled(tokens, self.text)
        if tokens.is_vision is not None:
            bits[tokens.is_vision] = self.rest
        return bits


@dataclass(frozen=True)
class PivotSalient:
    """Prompt tokens with massive activations stay exact, on top of another plan (section III-B2).

    `detector` "tokens": the `count` tokens with the largest |x| in the residual stream entering the
    layer; "elements": the tokens of the `count` largest elements (RotateKV's rule, fewer tokens);
    "threshold": at most `count` tokens with |x| > 100 and > 1000 times the median (Sun et al.).
    """

    count: int
    base: Plan
    detector: Detector = "tokens"

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        bits = self.base.prompt(tokens)
        if tokens.residual is None or not self.count:
            return bits
        stream = tokens.residual.detach()
        valid = tokens.valid.to(stream.device, non_blocking=True)
        find = self._largest_elements if self.detector == "elements" else self._largest_tokens
        bits[(find(stream, valid) & valid).to(bits.device)] = EXACT
        return bits

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return self.base.generated(tokens)

    def _largest_tokens(self, stream: Tensor, valid: Tensor) -> Tensor:
        """(B, n) bool of a (B, n, hidden) stream: pivots, and any padding where a row lacks them.

        Of equals, the first.
        """
        peak = torch.linalg.vector_norm(stream, torch.inf, -1).float().masked_fill(~valid, -1)
        order = peak.argsort(dim=1, descending=True, stable=True)[:, : self.count]
        chosen = torch.zeros_like(valid).scatter(1, order, True)
        if self.detector == "tokens":
            return chosen
        known = stream.abs().float().masked_fill(~valid[..., None], torch.nan)
        median = known.flatten(1).nanmedian(dim=1, keepdim=True).values
        return chosen & (peak > (1000 * median).clamp_min(100))

    def _largest_elements(self, stream: Tensor, valid: Tensor) -> Tensor:
        """As `_largest_tokens`, the tokens that hold the largest elements."""
        magnitude = stream.abs().float().masked_fill(~valid[..., None], -1)
        count = min(self.count, magnitude[0].numel())
        last = magnitude.flatten(1).topk(count).values[:, -1, None]
        above, equal = ((magnitude > last[..., None]).sum(2), (magnitude == last[..., None]).sum(2))
        before = equal.cumsum(1) - equal
        left = count - above.sum(1, keepdim=True)
        return (above > 0) | ((equal > 0) & (before < left))


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
    detector: Detector = "tokens"
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
