"""The two kinds of transformer layer as plain functions of tensors.

Nothing in them depends on which layer it is, so that one compiled function serves all layers, and
nothing but attention depends on how sequences are laid out, so that one shape serves all batches.
They compute what transformers' Siglip and LLaMA layers compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD = 64
"""Channels of an attention head, of the tower as well as of the language model."""

VISION_EPSILON = 1e-6


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """LLaMA's norm: statistics in float32, result in x's dtype times the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return wide.to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (N, heads, 64) by tables (N, 64) in float32."""
    wide = x.float()
    low, high = wide.chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def before_attention(
    x: Tensor, norm: Tensor, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder layer up to attention.

    Args:
        x: residual stream (N, D).
        norm: weight of the input norm (D,).
        qkv: the three projections' weights one below the other (heads * 64 in all, D).
        cos: rotary table (N, 64), float32.
        sin: likewise.
        kv_heads: how many heads keys and values have.
        epsilon: of the norm.

    Returns:
        query (N, heads, 64), key and value (N, kv_heads, 64).
    """
    heads = F.linear(rms_norm(x, norm, epsilon), qkv).view(x.shape[0], -1, HEAD)
    sizes = [heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads]
    query, key, value = torch.split(heads, sizes, 1)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def after_attention(
    x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """A decoder layer from attention's result (N, heads * 64) to the new residual stream."""
    x = x + F.linear(mixed, out)
    gate, up = F.linear(rms_norm(x, norm, epsilon), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def vision_layer(x: Tensor, weights: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """A Siglip encoder layer on (images, tokens, width); the residual stream is float32.

    Args:
        x: residual stream.
        weights: norm 1, query-key-value, attention output, norm 2, two of the MLP; each weight
            followed by its bias.
        dtype: of the matrix products.
    """
    n1, c1, qkv, c2, out, c3, n2, c4, up, c5, down, c6 = weights
    images, tokens, width = x.shape
    y = F.layer_norm(x, (width,), n1, c1, VISION_EPSILON).to(dtype)
    heads = F.linear(y, qkv.to(dtype), c2.to(dtype)).view(images, tokens, 3, -1, HEAD)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    x = x + F.linear(mixed.reshape(images, tokens, width), out.to(dtype), c3.to(dtype))
    y = F.layer_norm(x, (width,), n2, c4, VISION_EPSILON).to(dtype)
    y = F.gelu(F.linear(y, up.to(dtype), c5.to(dtype)), approximate="tanh")
    return x + F.linear(y, down.to(dtype), c6.to(dtype))


@dataclass
class Functions:
    """The three functions, compiled or plain, and whether layers are recomputed in backward."""

    before: Callable[..., Any] = before_attention
    after: Callable[..., Any] = after_attention
    vision: Callable[..., Any] = vision_layer
    recompute: bool = field(default=False)

    @classmethod
    def compiled(cls) -> Functions:
        """All three through torch.compile for one static shape each."""
        torch._dynamo.config.recompile_limit = 32
        before, after, vision = (
            torch.compile(f, dynamic=False)
            for f in (before_attention, after_attention, vision_layer)
        )
        return cls(before, after, vision)
