"""How much attention tokens draw, block by block: a T x T matrix is never held."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.cache.contract import Tokens

_LOGITS = 2**24
"""Logits held at once, at most (float32: 64 MiB)."""


def column_mass(tokens: Tokens, probes: Tensor | None = None) -> Tensor:
    """(B, H, n) float32: attention that each token draws from the tokens' own queries.

    Causal, without padding, and summed over the query heads that share a key head. `probes`, (B, P)
    int64, are the columns of the queries that count, repeats allowed, -1 for none; None: all.
    Zeros, for one head, where `tokens.attention` is None: only sizes are asked for.
    """
    states = tokens.attention
    if states is None:
        return torch.zeros(tokens.valid.shape[0], 1, tokens.valid.shape[1])
    rows, heads, count, _ = states.query.shape
    device = states.keys.device
    columns, valid = torch.arange(count, device=device), tokens.valid.to(device)
    chosen = columns.expand(rows, -1) if probes is None else probes.to(device)
    total = torch.zeros(states.keys.shape[:3], device=device)
    for index in chosen.split(block_size(rows * heads * count), 1):
        visible = valid[:, None] & (columns <= index[..., None])
        if states.sliding_window:
            visible &= columns > index[..., None] - states.sliding_window
        query = states.query.take_along_dim(index.clamp_min(0)[:, None, :, None], 2)
        total += drawn(query, states.keys, visible[:, None], states.scaling, states.softcap)
    return total


def seen_by(tokens: Tokens, probes: Tensor) -> Tensor:
    """(B, n) int64 on the probes' device: how many of the (B, P) probes see each token."""
    rows, count = tokens.valid.shape
    marks = torch.zeros(rows, count + 1, dtype=torch.int64, device=probes.device)
    # Probes of -1 count in a column of their own.
    marks.scatter_add_(1, probes % (count + 1), torch.ones_like(probes))
    later = marks[:, :count].flip(1).cumsum(1).flip(1)
    window = tokens.attention.sliding_window if tokens.attention else None
    if window and window < count:
        later[:, :-window] -= later[:, window:].clone()
    return later


def block_size(logits: int) -> int:
    """Queries to take at once when each has so many logits over all rows and heads."""
    return max(_LOGITS // max(logits, 1), 1)


def drawn(
    query: Tensor,
    keys: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """(B, H, T) float32: attention of (B, Hq, p, D) queries summed over queries and their heads.

    `visible` is (B, 1, p, T) bool or None (all); a query that sees nothing gives nothing.
    """
    wide = torch.promote_types(keys.dtype, torch.float32)
    grouped = query.unflatten(1, (keys.shape[1], -1)).to(wide)
    logits = grouped @ keys.to(wide).mT[:, :, None] * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is None:
        return logits.softmax(-1).sum((2, 3)).float()
    weights = logits.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0).sum((2, 3)).float()
