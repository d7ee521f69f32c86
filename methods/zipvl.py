"""ZipVL: as many important tokens as the attention needs, layer by layer (arXiv 2410.08584)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.cache import (
    DEFERRED,
    EVICTED,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Tokens,
    check_fields,
    column_mass,
    filled,
    seen_by,
)
from kvbench.errors import UserError
from kvbench.methods.zipcache import probe_columns, streaming, zip_sides


@dataclass(frozen=True)
class ZipVL:
    """Important tokens at `bits`, others at `low_bits` (or gone: `drop`, the paper's v2).

    Their number is the least whose attention from the probe queries reaches the share `tau` of all;
    important are those with most attention by probe that sees them (algorithm 1, eq. 6-9). One set
    a layer, from attention averaged over heads. Storage is ZipCache's, ranges of values over all
    heads; every `stream` new tokens are divided by the attention of the current query.

    The protocol sparse_prefill lets only important tokens attend, to each other, in the prompt:
    other positions get no attention output in that layer (the residual stream passes); the last
    prompt token always attends, to the cache as stored.

    There is no official code, and the paper was read at second hand: the probes (64 newest and 64
    others) are from memory, and so is the normalisation of eq. 6. Codes are written once, where
    ZipCache encodes the whole cache again.
    """

    label: ClassVar[str] = "ZipVL"
    paper: ClassVar[str] = "arXiv 2410.08584"
    needs: ClassVar[Needs] = Needs()
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (4, 8),
        "low_bits": (2, 4),
        "tau": (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.975, 0.99),
    }

    bits: int = 4
    low_bits: int = 2
    tau: float = 0.975
    recent_probes: int = 64
    random_probes: int = 64
    stream: int = 100
    drop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: no probes, a share outside (0, 1], or two codecs for the same bits.
        """
        check_fields(self)
        if not 0.0 < self.tau <= 1.0 or self.seed < 0:
            raise UserError("ZipVL's tau must lie in (0, 1] and its seed can't be negative.")
        if self.recent_probes < 1 or self.random_probes < 0:
            raise UserError("ZipVL needs a recent probe at least, and no fewer than 0 random ones.")
        streaming(self.stream)
        if self.bits == self.low_bits:
            raise UserError("ZipVL's low_bits must differ from its bits.")

    @property
    def rest(self) -> int:
        """The tier of unimportant tokens."""
        return EVICTED if self.drop else self.low_bits

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Two tiers, one set of important tokens for all heads."""
        tiers = (self.bits,) if self.drop else (self.bits, self.low_bits)
        key, value = zip_sides(spec, tiers, streaming(self.stream), merged=True)
        plan = _Important(self)
        return LayerQuantizer(key, value, plan, evicts=self.drop, sparse_tiers=(self.rest,))


@dataclass(frozen=True)
class _Important:
    method: ZipVL

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        how = self.method
        if tokens.attention is None:
            return filled(tokens, how.bits)
        rows = len(tokens.valid)
        newest, others = [how.recent_probes] * rows, [how.random_probes] * rows
        probes = probe_columns(tokens, newest, others, how.seed, repeats=False)
        mass = column_mass(tokens, probes).sum(1).cpu()
        score = (mass / seen_by(tokens, probes).clamp_min(1)).masked_fill(~tokens.valid, -1)
        tiers = self._divided(mass, score)
        tiers[:, -1] = how.bits
        return tiers

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return filled(tokens, DEFERRED)

    def settle(self, mass: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(R, n) int8."""
        counts = torch.tensor(lengths, device=mass.device)[:, None]
        outside = torch.arange(mass.shape[1], device=mass.device) >= counts
        known = mass.masked_fill(outside, 0)
        return self._divided(known, known.masked_fill(outside, -1))

    def _divided(self, mass: Tensor, score: Tensor) -> Tensor:
        """(B, n) tiers: as many as hold `tau` of the mass are important, the highest scores."""
        most = mass.double().sort(dim=1, descending=True).values.cumsum(1)
        count = (most < self.method.tau * most[:, -1:]).sum(1, keepdim=True) + 1
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        full = torch.full_like(score, self.method.rest, dtype=torch.int8)
        return full.masked_fill(rank < count, self.method.bits)


METHODS: dict[str, KVQuantizer] = {"zipvl": ZipVL()}
