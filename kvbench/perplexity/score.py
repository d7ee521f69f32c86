"""Teacher forcing through a cache, held against the 16-bit cache's own logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.evaluation.decode import decode_step, prefill, prompt_logits
from kvbench.models.inputs import ModelInputs
from kvbench.perplexity.rows import Scores

if TYPE_CHECKING:
    from transformers import Cache

_CHUNK = 64
"""Positions whose distributions are held in float32 at a time."""


@torch.no_grad()
def forced_logits(
    model: Any, ids: Tensor, cache: Cache, context: int, *, split: bool = False
) -> Iterator[Tensor]:
    """Feed B windows (B, T) to the model; logits (B, n, V) of some positions at a time, in order.

    The first `context` tokens go in at once. Where they are the whole window, logits are of all T
    positions; else of the context's last, and then of each further token, which are fed one by one
    and so read the cache as stored.

    Args:
        model: A transformers model on the ids' device.
        ids: Token ids.
        cache: An empty cache.
        context: Tokens of the window to read at once.
        split: Whether the context's last token is decoded on its own, as a peer's cache may need.
    """
    mask = torch.ones_like(ids)
    prompt = ModelInputs(
        ids[:, :context], mask[:, :context], mask[:, :context] == 0, (context,) * len(ids)
    )
    if context == ids.shape[1]:
        yield from prompt_logits(model, prompt, cache, 0).split(_CHUNK, 1)
        return
    yield prefill(model, prompt, cache, split=split)[:, None]
    for end in range(context + 1, ids.shape[1] + 1):
        yield decode_step(model, ids[:, end - 1 : end], mask[:, :end], cache)[:, None]


@torch.no_grad()
def compare(
    chunks: Iterable[Tensor], reference: Sequence[Tensor], targets: Tensor
) -> list[Scores | None]:
    """Score B windows at the positions of `targets` (B, n), the true next tokens.

    Args:
        chunks: Logits (B, n', V) that together make up all n positions.
        reference: The 16-bit cache's, in chunks of the same sizes.
        targets: Token ids.

    Returns:
        A window's scores; None where a logit is not finite.
    """
    columns = []
    start = 0
    for mine, theirs in zip(chunks, reference, strict=True):
        stop = start + mine.shape[1]
        columns.append(_positions(mine, theirs, targets[:, start:stop]))
        start = stop
    table = torch.cat(columns, 2).double().cpu()
    return [_scores(*table[:, row]) for row in range(len(targets))]


def _positions(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """(4, B, n) float32: nll, KL, agreement and change of probability at each position."""
    q, p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    mine, theirs = (x.gather(2, targets[..., None])[..., 0] for x in (q, p))
    # Rounding alone can make the sum of equal distributions a little negative.
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    agreeing = logits.argmax(-1) == reference.argmax(-1)
    return torch.stack((-mine, kl, agreeing, mine.exp() - theirs.exp()))


def _scores(nll: Tensor, kl: Tensor, agreeing: Tensor, delta_p: Tensor) -> Scores | None:
    if not (nll.isfinite().all() and kl.isfinite().all()):
        return None
    return Scores(_rounded(nll), _rounded(kl), int(agreeing.sum()), float(delta_p.square().mean()))


def _rounded(values: Tensor) -> list[float]:
    """Six digits, which is what float32 has to say."""
    return [float(f"{value:.6g}") for value in values.tolist()]
