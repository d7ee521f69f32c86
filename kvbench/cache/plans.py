"""Plans that several methods share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache.contract import EXACT, Tokens


def filled(tokens: Tokens, bits: int) -> Tensor:
    """(B, n) int8, the same bits for every token."""
    return torch.full_like(tokens.valid, bits, dtype=torch.int8)


@dataclass(frozen=True)
class Uniform:
    """Every token gets the same bits; the first `sinks` tokens of a row stay exact (SKVQ)."""

    bits: int
    sinks: int = 0

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        bits = filled(tokens, self.bits)
        if self.sinks:
            rank = tokens.valid.cumsum(1)
            bits[tokens.valid & (rank <= self.sinks)] = EXACT
        return bits

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return filled(tokens, self.bits)
