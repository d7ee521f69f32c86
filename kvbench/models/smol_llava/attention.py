"""Causal attention over sequences laid end to end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""query (N, heads, 64), key and value (N, kv_heads, 64), bounds int32 (S + 1,), longest sequence.

Returns (N, heads * 64).
"""

TOLERANCE = 2e-2  # bfloat16 against bfloat16, relative to the largest element

log = logging.getLogger(__name__)


def padded(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Through torch's attention on one padded row a sequence; works everywhere."""
    starts = bounds[:-1, None].long()
    steps = torch.arange(longest, device=bounds.device)
    # Behind a sequence's end any token will do: causality hides it from the sequence's own.
    rows = (starts + steps).clamp_(max=query.shape[0] - 1)
    q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    own = steps < bounds.diff()[:, None]
    return mixed.transpose(1, 2)[own].flatten(1)


def ragged(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """Through torch's flash kernel for sequences of different length, without padding."""
    mixed = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False
    )[0]
    return mixed.flatten(1)


def agree(device: torch.device) -> bool:
    """Whether both give the same results and gradients on random bfloat16 sequences."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 70, 71, 300, 512], dtype=torch.int32, device=device)
    shapes = ((512, 9, 64), (512, 3, 64), (512, 3, 64), (512, 576))
    query, key, value, upstream = (
        torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    found = []
    for attention in (padded, ragged):
        inputs = [x.clone().requires_grad_() for x in (query, key, value)]
        mixed = attention(*inputs, bounds, 229)
        mixed.backward(upstream)
        found.append([mixed.detach(), *(x.grad for x in inputs if x.grad is not None)])
    return len(found[0]) == len(found[1]) == 4 and all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
        for a, b in zip(*found, strict=True)
    )


def best(device: torch.device) -> Attention:
    """`ragged` where the GPU has it and it agrees with `padded`, else `padded`."""
    if device.type != "cuda":
        return padded
    try:
        if agree(device):
            return ragged
        log.warning("the ragged attention kernel disagrees with the padded one")
    except (RuntimeError, AttributeError, TypeError) as error:
        log.warning("no ragged attention kernel: %s", error)
    return padded
