"""What attention does with a prompt, from a block of queries at a time.

For T tokens nothing of T x T numbers is ever made: a block has as many queries as fit in
`BLOCK` weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.analysis.capture import LayerView

BLOCK = 2**22
"""Attention weights (heads x queries x keys) in memory at a time."""
FIRST = 5
"""Tokens at the beginning that are no part of a modality's mean, as in Figure 4: they draw
attention wherever they are."""


@dataclass(frozen=True)
class AttentionSummary:
    """Sums over one layer's attention weights on a prompt of T tokens; all on the CPU, float64.

    "Far" is attention to keys at least `near` tokens before the query: what is left without the
    local pattern, in which every token looks at its neighbours.

    Attributes:
        received: (T,) mean weight that queries which see a token give it, mean over heads.
        far: (T,) the same over far queries only; 0 where there are none.
        far_mass: (T,) sum of these weights instead of their mean.
        far_queries: (T,) number of far queries of each token.
        text: (Hq,) mean weight on a far text token, over queries that also see far vision tokens.
        vision: (Hq,) mean weight on a far vision token, over the same queries.
        queries: Number of those queries; 0 leaves text and vision 0.
        grid: (n, n) mean weight of query bins on key bins, mean over heads.
    """

    received: Tensor
    far: Tensor
    far_mass: Tensor
    far_queries: Tensor
    text: Tensor
    vision: Tensor
    queries: int
    grid: Tensor


def weight_blocks(view: LayerView) -> Iterator[tuple[int, Tensor]]:
    """First query and float32 weights (Hq, b, n) of each block; later keys than n are unseen."""
    heads, tokens, _ = view.query.shape
    keys = view.keys.float()
    size = max(BLOCK // (heads * tokens), 1)
    columns = torch.arange(tokens, device=keys.device)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        seen = tokens if view.mask is not None else stop
        query = view.query[:, start:stop].float().unflatten(0, (keys.shape[0], -1))
        logits = torch.einsum("hgbd,htd->hgbt", query, keys[:, :seen]).flatten(0, 1)
        logits *= view.scaling
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        if view.mask is None:
            logits.masked_fill_(columns[:seen] > columns[start:stop, None], -torch.inf)
        elif view.mask.dtype == torch.bool:
            logits.masked_fill_(~view.mask[start:stop], -torch.inf)
        else:
            logits += view.mask[start:stop]
        yield start, logits.softmax(-1)


def summarise(view: LayerView, is_vision: Tensor, bins: Tensor, *, near: int) -> AttentionSummary:
    """Run over a layer's attention once.

    Args:
        view: The layer.
        is_vision: (T,) bool.
        bins: (T,) int64, the bin of each token in `grid`.
        near: Distance between query and key from which on attention is "far".
    """
    heads, tokens, _ = view.query.shape
    device = view.query.device
    columns = torch.arange(tokens, device=device)
    received, mass = torch.zeros(2, tokens, dtype=torch.float64, device=device)
    kinds = _kinds(is_vision.to(device))
    sums = torch.zeros(heads, 2, dtype=torch.float64, device=device)
    queries = 0
    grid = _Grid(bins, device)
    for start, weights in weight_blocks(view):
        seen = weights.shape[2]
        rows = columns[start : start + weights.shape[1]]
        received[:seen] += weights.sum((0, 1)) / heads
        grid.add(rows, weights.mean(0))
        distant = (rows[:, None] - columns[:seen] >= near).float()
        weights *= distant
        mass[:seen] += weights.sum((0, 1)) / heads
        counts = distant @ kinds[:seen]
        both = counts.amin(1) > 0
        sums += ((weights @ kinds[:seen])[:, both] / counts[both]).sum(1)
        queries += int(both.sum())
    visible = tokens - columns
    far_queries = (visible - near).clamp_min(0)
    means = (sums / max(queries, 1)).cpu()
    return AttentionSummary(
        (received / visible).cpu(),
        (mass / far_queries.clamp_min(1)).cpu(),
        mass.cpu(),
        far_queries.cpu(),
        means[:, 0],
        means[:, 1],
        queries,
        grid.mean(),
    )


def _kinds(is_vision: Tensor) -> Tensor:
    """(T, 2) float32: text and vision tokens, without the first ones."""
    kinds = torch.stack((~is_vision, is_vision), 1).float()
    kinds[:FIRST] = 0
    return kinds


class _Grid:
    """Mean attention between bins of tokens."""

    def __init__(self, bins: Tensor, device: torch.device) -> None:
        self._member = torch.nn.functional.one_hot(bins).float().to(device)
        count = self._member.shape[1]
        self._sums = torch.zeros(count, count, device=device)

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Weights (b, n) of the queries `rows` on the first n keys."""
        self._sums += self._member[rows].T @ weights @ self._member[: weights.shape[1]]

    def mean(self) -> Tensor:
        """Mean weight over all pairs of two bins, pairs that can't see each other counting 0."""
        sizes = self._member.sum(0)
        return (self._sums / sizes[:, None] / sizes).double().cpu()
