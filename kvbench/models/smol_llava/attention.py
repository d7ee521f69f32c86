"""Causal attention over sequences laid end to end."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Causal attention within each sequence."""

    __name__: str

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int
    ) -> Tensor:
        """Mixed values (N, heads * 64).

        Args:
            query: (N, heads, 64).
            key: (N, kv_heads, 64).
            value: likewise.
            bounds: int32 (S + 1,), where sequences begin and the last one ends.
            longest: length of the longest sequence.
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
    mixed: Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, bounds, bounds, longest, longest, 0.0, True, False
    )[0]
    return mixed.flatten(1)


def repeated(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int) -> Tensor:
    """As `ragged`, for kernels that want as many key and value heads as query heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return ragged(query, key, value, bounds, longest)


def agrees(candidate: Attention, device: torch.device) -> bool:
    """Whether it gives results and gradients of `padded` on random bfloat16 sequences."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 70, 71, 300, 512], dtype=torch.int32, device=device)
    shapes = ((512, 9, 64), (512, 3, 64), (512, 3, 64), (512, 576))
    query, key, value, upstream = (
        torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes
    )
    found = []
    for attention in (padded, candidate):
        q, k, v = (x.clone().requires_grad_() for x in (query, key, value))
        mixed = attention(q, k, v, bounds, 229)
        found.append([mixed, *torch.autograd.grad(mixed, (q, k, v), upstream)])
    return all(
        bool((a - b).abs().max() <= TOLERANCE * a.abs().max()) for a, b in zip(*found, strict=True)
    )


def best(device: torch.device) -> Attention:
    """The fastest that works on the device and agrees with `padded`."""
    for candidate in (ragged, repeated) if device.type == "cuda" else ():
        try:
            if agrees(candidate, device):
                return candidate
            log.warning("attention %r disagrees with the padded one", candidate.__name__)
        except (RuntimeError, AttributeError, TypeError) as error:
            log.warning("no attention %r: %.300s", candidate.__name__, error)
    return padded
