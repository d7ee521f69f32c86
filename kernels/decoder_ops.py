"""What a decoder layer of LLaMA's kind does besides matrices and attention, one new token a row.

Each function is one launch on CUDA and plain torch elsewhere, and takes rows at any stride as long
as their numbers lie side by side. Nothing waits for the device: all can be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kvbench.kernels.hadamard import hadamard
from kvbench.kernels.launch import use_triton

_ROTATED = range(32, 513)
"""Channels of heads that the kernel multiplies, half by half, on a matrix unit."""


def unsupported(head_dim: int, rotary_dim: int, rotate: bool) -> str | None:
    """Why `rope` can't serve such heads, in a sentence, or None if it can."""
    if rotary_dim != head_dim:
        return f"rotary embedding of {rotary_dim} of {head_dim} channels has no kernel."
    if head_dim % 2:
        return f"rotary embedding needs an even number of channels, not {head_dim}."
    if rotate and head_dim & (head_dim - 1):
        return f"the Hadamard of {head_dim} channels has no kernel: not a power of two."
    return None


def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding of queries and keys, computed in float32 and rounded once.

    qkv is (B, (Hq + 2H) · D); cos and sin (B, D), both halves of D filled as transformers'
    `rotary_emb` gives them. Returns queries (B, Hq, D), keys (B, H, D) and values (B, H, D), a
    view. With `rotate`, embedded queries and keys are multiplied by Sylvester's Hadamard matrix
    over sqrt(D): products by +-1, sums in float32, scaled last.
    """
    size = cos.shape[-1]
    value = qkv[:, (heads + kv_heads) * size :].unflatten(1, (kv_heads, size))
    if use_triton(qkv) and (not rotate or size in _ROTATED):
        from kvbench.kernels import decoder_ops_triton as kernels

        return *kernels.rope(qkv, cos, sin, heads, kv_heads, rotate), value
    states = qkv[:, : (heads + kv_heads) * size].unflatten(1, (-1, size)).float()
    first, second = states.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    embedded = (states * cos[:, None].float() + turned * sin[:, None].float()).to(qkv.dtype)
    if rotate:
        embedded = hadamard(embedded, size**-0.5)
    query, key = embedded.split((heads, kv_heads), 1)
    return query, key, value


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm of x + residual, and that sum (x itself without a residual).

    All (B, hidden) in one dtype, weight (hidden,). As `LlamaRMSNorm`: statistics in float32, the
    quotient rounded to the dtype before it is multiplied by the weight.
    """
    if use_triton(x):
        from kvbench.kernels import decoder_ops_triton as kernels

        return kernels.add_rms_norm(x, residual, weight, eps)
    total = x if residual is None else x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of (B, 2F) gates, then ups: (B, F). The silu is rounded to the dtype."""
    if use_triton(gate_up):
        from kvbench.kernels import decoder_ops_triton as kernels

        return kernels.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
