"""Plans that several methods share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvbench.cache.contract import EXACT, LayerQuantizer, Plan, Tokens

PivotDetector = Literal["tokens", "elements", "threshold"]


def filled(tokens: Tokens, bits: int) -> Tensor:
    """(B, n) int8, the same bits for every token."""
    return torch.full_like(tokens.valid, bits, dtype=torch.int8)


@dataclass(frozen=True)
class Uniform:
    """Every token gets the same bits; the first `sinks` tokens of a row stay exact (SKVQ, OSCAR).

    Where the prompt is shorter, the tokens after it are the rest of them.
    """

    bits: int
    sinks: int = 0

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return self._from(tokens, (0,) * len(tokens.valid))

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8; tokens come after the sinks unless `before` says otherwise."""
        return self._from(tokens, tokens.before or (self.sinks,))

    def _from(self, tokens: Tokens, before: tuple[int, ...]) -> Tensor:
        bits = filled(tokens, self.bits)
        if min(before) < self.sinks:
            left = self.sinks - tokens.valid.new_tensor(before, dtype=torch.long)
            bits[tokens.valid & (tokens.valid.cumsum(1) <= left[:, None])] = EXACT
        return bits


@dataclass(frozen=True)
class TextSalient:
    """Text tokens get more bits than vision tokens (AKVQ-VL, section III-B1)."""

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
    """Prompt tokens with massive activations stay exact, on top of another plan.

    AKVQ-VL, section III-B2.

    `detector` "tokens": the `count` tokens with the largest |x| in the residual stream entering the
    layer; "elements": the tokens of the `count` largest elements (RotateKV's rule, fewer tokens);
    "threshold": at most `count` tokens with |x| > 100 and > 1000 times the median (Sun et al.).
    """

    count: int
    base: Plan
    detector: PivotDetector = "tokens"

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


def kept_exact(quantizer: LayerQuantizer) -> LayerQuantizer:
    """A method's bases, windows and order of tokens, with every token exact."""
    key, value = (replace(side, recent=None) for side in (quantizer.key, quantizer.value))
    return replace(quantizer, key=key, value=value, plan=Uniform(EXACT))
