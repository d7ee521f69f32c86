"""ZipCache: more bits for the tokens that probe queries find salient (arXiv 2405.14256)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.cache import (
    DEFERRED,
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    MergeHeads,
    Needs,
    PromptScale,
    Side,
    Sliding,
    Tokens,
    Transform,
    check_fields,
    column_mass,
    filled,
    seen_by,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class ZipCache:
    """Salient tokens at `bits`, the least salient share `unimportant` at `low_bits`.

    Saliency is attention drawn from probe queries (the newest `probes`, as a share of the prompt,
    and as many drawn from the others), divided by the number of queries that could see the token.
    Keys have one range a channel over a tier of the prompt; values are divided by
    c = sqrt(max_t|v|) a channel and have one range a token. New tokens are exact until there are
    `stream`; these are then divided by the attention of the current query.

    Official code: divides by the causal queries of the whole prompt though only the probes were
    summed, which favours late tokens (`as_shipped`; else by the probes that saw the token, as the
    paper's formula has it). It encodes the whole cache anew from decoded values every `stream`
    tokens; here codes are written once, new tokens have key ranges of their own, and c is the
    prompt's. With a tier a head, a value's range is that of a head instead of all heads, where the
    official code puts different tokens of different heads into one range; `per_head=False` ranks
    tokens once a layer and has the paper's ranges.
    """

    label: ClassVar[str] = "ZipCache"
    paper: ClassVar[str] = "arXiv 2405.14256"
    needs: ClassVar[Needs] = Needs()
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (4, 8),
        "unimportant": (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99),
        "per_head": (True, False),
    }

    bits: int = 4
    low_bits: int = 2
    unimportant: float = 0.4
    probes: float = 0.05
    stream: int = 100
    per_head: bool = True
    as_shipped: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a share outside [0, 1], or two codecs for the same bits.
        """
        check_fields(self)
        if not (0.0 <= self.unimportant <= 1.0 and 0.0 < self.probes <= 1.0 and self.seed >= 0):
            raise UserError(
                "ZipCache's unimportant share must lie in [0, 1], its probes in (0, 1], and its "
                "seed can't be negative."
            )
        streaming(self.stream)
        if self.bits == self.low_bits:
            raise UserError("ZipCache's low_bits must differ from its bits.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Channelwise keys and channel-separable tokenwise values in two tiers."""
        tiers, window = (self.bits, self.low_bits), streaming(self.stream)
        key, value = zip_sides(spec, tiers, window, merged=not self.per_head)
        return LayerQuantizer(key, value, _Salient(self), heads_apart=self.per_head)


@dataclass(frozen=True)
class _Salient:
    method: ZipCache

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, H, n) int8, or (B, n) where tokens are ranked once a layer."""
        how = self.method
        lengths = tokens.valid.sum(1)
        share = [max(int(how.probes * count), 1) for count in lengths.tolist()]
        probes = probe_columns(tokens, share, share, how.seed, repeats=True)
        mass = column_mass(tokens, probes)
        mass = mass if how.per_head else mass.sum(1, keepdim=True)
        chances = seen_by(tokens, probes)
        if how.as_shipped:
            chances = lengths[:, None] - tokens.valid.cumsum(1) + 1
        score = mass / chances.clamp_min(1).to(mass.device)[:, None]
        score = score.masked_fill(~tokens.valid.to(mass.device)[:, None], torch.inf)
        tiers = self._divided(score, lengths[:, None, None].to(mass.device))
        return tiers if how.per_head else tiers[:, 0]

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return filled(tokens, DEFERRED)

    def settle(self, mass: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(R, n) int8."""
        counts = torch.tensor(lengths, device=mass.device)[:, None]
        outside = torch.arange(mass.shape[1], device=mass.device) >= counts
        return self._divided(mass.masked_fill(outside, torch.inf), counts)

    def _divided(self, score: Tensor, counts: Tensor) -> Tensor:
        """Low bits for the share of `counts` with the lowest scores along the last dimension."""
        low = (self.method.unimportant * counts.double()).floor()
        rank = score.argsort(dim=-1, stable=True).argsort(dim=-1)
        full = torch.full_like(score, self.method.bits, dtype=torch.int8)
        return full.masked_fill(rank < low, self.method.low_bits)


def streaming(tokens: int) -> Sliding:
    """No prompt token is exact, and new ones are until there are so many."""
    return Sliding(0, counts_current=False, flush_every=tokens, prompt=False)


def zip_sides(
    spec: LayerSpec, tiers: tuple[int, ...], window: Sliding, merged: bool
) -> tuple[Side, Side]:
    """ZipCache's storage: keys by channel over a write, values by token after channel scales.

    `merged`: a value's range is over all heads of the token.
    """
    width = spec.head_dim * (spec.num_kv_heads if merged else 1)
    scale: Transform = PromptScale(_separate)
    key = Side({b: Affine(b, None, along="tokens", zero="float") for b in tiers}, window=window)
    value = Side(
        {b: Affine(b, width, zero="float") for b in tiers},
        MergeHeads(spec, inner=scale) if merged else scale,
        window,
    )
    return key, value


def _separate(values: Tensor, tokens: Tokens) -> Tensor:
    """(B, H, D) sqrt(max_t|v|), 1 for a channel of zeros."""
    padding = ~tokens.valid.to(values.device)[:, None, :, None]
    scale = values.abs().masked_fill(padding, 0).amax(2).float().sqrt()
    # Kept as float16: neither zero nor infinite in it.
    return torch.where(scale > 0, scale, 1.0).clamp(2.0**-14, 6e4)


def probe_columns(
    tokens: Tokens, newest: list[int], others: list[int], seed: int, repeats: bool
) -> Tensor:
    """(B, P) int64 columns of the newest tokens of each row and of some earlier ones; -1: none.

    The draw depends on the row's length and the seed alone, not on padding or on other rows.
    """
    rows = []
    for valid, last, more in zip(tokens.valid, newest, others, strict=True):
        columns = valid.nonzero().squeeze(1)
        early = columns[: max(len(columns) - last, 0)]
        source = torch.Generator().manual_seed(seed)
        if repeats and len(early):
            drawn = torch.randint(len(early), (more,), generator=source)
        else:
            drawn = torch.randperm(len(early), generator=source)[:more]
        rows.append(torch.cat((early[drawn], columns[len(early) :])))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


METHODS: dict[str, KVQuantizer] = {"zipcache": ZipCache()}
