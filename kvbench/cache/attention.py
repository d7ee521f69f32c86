"""The attention function that reads a quantized cache, known to transformers as "kvbench"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvbench.cache.contract import LogitMap
from kvbench.cache.mass import block_size
from kvbench.cache.ragged import Lengths, left_aligned, within

if TYPE_CHECKING:
    from kvbench.cache.layer import QuantizedLayer
    from kvbench.cache.ragged import Ragged

NAME = "kvbench"


class StoredStates:
    """What a quantized layer's `update` returns instead of keys and values."""

    def __init__(self, layer: QuantizedLayer, keys: Tensor, values: Tensor) -> None:
        """Remember the layer and this step's own exact states (B, H, n, D)."""
        self.layer, self.keys, self.values = layer, keys, values
        self.stored = self.settled = False
        """Whether the cache has taken these, and whether its windows have shrunk since."""
        self.before: tuple[Ragged, Ragged, Ragged] | None = None
        """Keys, values and slots stored before this step, when a conversation goes on exactly."""
        self.sparse: Tensor | None = None
        """(B, n) bool: prompt positions that attend under sparse_prefill."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
    maps: Sequence[tuple[LogitMap, Tensor]] = (),
) -> Tensor:
    """Attention of (B, Hq, n, D) on (B, H, T, D); visible is (B, 1, n, T) bool or None (all).

    `causal`, instead of `visible`: T = n, keys and values stand in the order of the queries.
    `maps` change the logits of some tokens each, (B, T) bool.
    """
    rows, heads, new, width = query.shape
    groups = heads // keys.shape[1]
    if visible is not None:
        # A padding query sees nothing; let it see everything, its output is never used.
        visible = visible | ~visible.any(-1, keepdim=True)
    if softcap is not None or maps:
        return _on_logits(query, keys, values, visible, scaling, softcap, maps)
    if new == 1:
        query = query.reshape(rows, keys.shape[1], groups, width)
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    bias = _bias(visible, query)
    out = scaled_dot_product_attention(
        query, keys, values, attn_mask=bias, is_causal=causal, scale=scaling
    )
    return out.reshape(rows, heads, new, values.shape[-1])


def _bias(visible: Tensor | None, query: Tensor) -> Tensor | None:
    """What sdpa makes of a bool mask, made sooner: a quarter faster on CPUs."""
    if visible is None:
        return None
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, float("-inf"))


def _on_logits(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None,
    maps: Sequence[tuple[LogitMap, Tensor]],
) -> Tensor:
    """Attention whose logits are softcap · tanh(logits / softcap) (Gemma-2), then mapped."""
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    size = block_size(query.shape[0] * query.shape[1] * keys.shape[2])
    outs, seen = [], None
    for start in range(0, query.shape[2], size):
        logits = query[:, :, start : start + size] @ keys.mT * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if visible is not None:
            seen = visible[:, :, start : start + size]
        for change, tokens in maps:
            chosen = tokens[:, None, None].expand(-1, 1, logits.shape[2], -1)
            logits = change(logits, chosen if seen is None else chosen & seen)
        if seen is not None:
            logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        outs.append(logits.float().softmax(-1).to(query.dtype) @ values)
    return torch.cat(outs, 2)


def attend_sparsely(
    query: Tensor,
    step: StoredStates,
    attends: Tensor,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Exact attention among some (B, n) positions of a prompt; others get zeros (ZipVL, alg. 1)."""
    counts: Lengths = tuple(attends.sum(1).tolist())
    width, new = max(counts), query.shape[2]
    mine = attends.to(query.device)
    q, k, v = (left_aligned(x, mine, counts).data for x in (query, step.keys, step.values))
    columns = torch.arange(new, device=query.device).expand(mine.shape)[:, None]
    places = left_aligned(columns, mine, counts).data[:, 0]
    inside = within(counts, width, query.device)
    visible = inside[:, None] & (places[:, None] <= places[..., None])
    if sliding_window:
        visible &= places[:, None] > places[..., None] - sliding_window
    out = attend(q, k, v, visible[:, None], scaling, softcap)
    index = places.masked_fill(~inside, new)[:, None, :, None].expand(out.shape)
    full = out.new_zeros(*out.shape[:2], new + 1, out.shape[3])
    return full.scatter_(2, index, out)[:, :, :new]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | StoredStates,
    value: Tensor | StoredStates,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers: query (B, Hq, n, D) after RoPE to (B, n, Hq, D).

    Plain tensors (vision towers, other caches) take transformers' sdpa.
    """
    if isinstance(key, StoredStates):
        out = key.layer.attend(module, query, key, attention_mask, **options)
        return out.transpose(1, 2).contiguous(), None
    keys, values = key, cast(Tensor, value)
    if options.get("softcap") is not None:
        visible = attention_mask
        if visible is None and query.shape[2] > 1:
            shape = (query.shape[2], keys.shape[2])
            visible = torch.ones(shape, dtype=torch.bool, device=query.device)
            visible = visible.tril(shape[1] - shape[0])[None, None]
        out = attend(query, keys, values, visible, options["scaling"], options["softcap"])
        return out.transpose(1, 2).contiguous(), None
    return sdpa_attention_forward(module, query, keys, values, attention_mask, **options)


# Both tables: without the second the mask is silently None and padding is attended to.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
