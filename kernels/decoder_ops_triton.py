"""Triton kernels of one decoder step: rope with an optional Hadamard, norm and activation."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.hadamard_triton import signs_block, sums_of_signs

_HEADS = 16  # of a program: the fewest rows that a tensor core takes
_ACTIVATIONS = 1024


@triton.jit
def rope_kernel(
    qkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    qkv_row: int,
    cos_row: int,
    sin_row: int,
    HQ: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    SCALE: tl.constexpr,
) -> None:
    """A program turns HEADS query and key heads of one row; HALF is D / 2 filled up to 2^k."""
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    real = channel < D // 2
    mask = (head < HQ + H) & real
    source = qkv + row * qkv_row + head * D + channel
    cos += row * cos_row + channel
    sin += row * sin_row + channel
    a = tl.load(source, mask, 0.0).to(tl.float32)
    b = tl.load(source + D // 2, mask, 0.0).to(tl.float32)
    cos_a = tl.load(cos, real, 0.0).to(tl.float32)
    cos_b = tl.load(cos + D // 2, real, 0.0).to(tl.float32)
    sin_a = tl.load(sin, real, 0.0).to(tl.float32)
    sin_b = tl.load(sin + D // 2, real, 0.0).to(tl.float32)
    dtype: tl.constexpr = query.dtype.element_ty
    first = (a * cos_a - b * sin_a).to(dtype)
    second = (b * cos_b + a * sin_b).to(dtype)
    if ROTATE:
        first, second = sums_of_signs((first, second), signs_block(HALF, dtype), SCALE)
    query += (row * HQ + head) * D + channel
    tl.store(query, first, mask & (head < HQ))
    tl.store(query + D // 2, second, mask & (head < HQ))
    key += (row * H + head - HQ) * D + channel
    tl.store(key, first, mask & (head >= HQ))
    tl.store(key + D // 2, second, mask & (head >= HQ))


@triton.jit
def add_rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    total: tl.tensor,
    n: int,
    x_row: int,
    residual_row: int,
    eps: float,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program a row; with ADD, x + residual is written to `total` and normed, else x is."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    mask = channel < n
    values = tl.load(x + row * x_row + channel, mask, 0.0)
    gain = tl.load(weight + channel, mask, 0.0)  # early: it needs not wait for the sum
    if ADD:
        values = values.to(tl.float32)
        values += tl.load(residual + row * residual_row + channel, mask, 0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * n + channel, values, mask)
    wide = values.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / n + eps)
    wide = wide.to(normed.dtype.element_ty).to(tl.float32) * gain.to(tl.float32)
    tl.store(normed + row * n + channel, wide.to(normed.dtype.element_ty), mask)


@triton.jit
def silu_mul_kernel(
    gate_up: tl.tensor, out: tl.tensor, n: int, row_stride: int, BLOCK: tl.constexpr
) -> None:
    """A program takes BLOCK channels of one row."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < n
    source = gate_up + row * row_stride + channel
    gate = tl.load(source, mask, 0.0).to(tl.float32)
    up = tl.load(source + n, mask, 0.0).to(tl.float32)
    gate = gate / (1 + tl.exp(-gate))
    gate = gate.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * n + channel, (gate * up).to(out.dtype.element_ty), mask)


def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, rotate: bool
) -> tuple[Tensor, Tensor]:
    """Queries (B, Hq, D) and keys (B, H, D)."""
    rows, channels = cos.shape
    query = qkv.new_empty(rows, heads, channels)
    key = qkv.new_empty(rows, kv_heads, channels)
    rope_kernel[rows, triton.cdiv(heads + kv_heads, _HEADS)](
        qkv,
        cos,
        sin,
        query,
        key,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        HQ=heads,
        H=kv_heads,
        D=channels,
        HALF=triton.next_power_of_2(channels // 2),
        HEADS=_HEADS,
        ROTATE=rotate,
        SCALE=channels**-0.5,
        num_warps=1 if rotate else 4,  # warps that share a product would all turn all heads
    )
    return query, key


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Norm of x + residual, and the sum; x itself is the sum where there is no residual."""
    rows, n = x.shape
    normed = x.new_empty(rows, n)
    total = x if residual is None else x.new_empty(rows, n)
    added = x if residual is None else residual
    block = triton.next_power_of_2(n)
    add_rms_norm_kernel[rows,](
        x,
        added,
        weight,
        normed,
        total,
        n,
        x.stride(0),
        added.stride(0),
        eps,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),  # 16 bytes a thread
    )
    return normed, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, (B, 2F) to (B, F)."""
    rows, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, n)
    grid = triton.cdiv(n, _ACTIVATIONS), rows
    silu_mul_kernel[grid](gate_up, out, n, gate_up.stride(0), BLOCK=_ACTIVATIONS, num_warps=4)
    return out


def compile_examples() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernel, types of its arguments, constants and warps, for ahead-of-time compilation."""
    examples: list[tuple[Any, dict[str, str], dict[str, Any], int]] = []
    for dtype in ("fp16", "bf16", "fp32"):
        state = f"*{dtype}"
        tensors = dict.fromkeys(("qkv", "cos", "sin", "query", "key"), state)
        rows = dict.fromkeys(("qkv_row", "cos_row", "sin_row"), "i32")
        shape = {"HQ": 28, "H": 4, "D": 128, "HALF": 64, "HEADS": _HEADS, "SCALE": 128**-0.5}
        examples += [
            (rope_kernel, tensors | rows, shape | {"ROTATE": False}, 4),
            (rope_kernel, tensors | rows, shape | {"ROTATE": True}, 1),
        ]
        tensors = dict.fromkeys(("x", "residual", "weight", "normed", "total"), state)
        numbers = dict.fromkeys(("n", "x_row", "residual_row"), "i32") | {"eps": "fp32"}
        block = {"ADD": True, "BLOCK": 4096}
        examples.append((add_rms_norm_kernel, tensors | numbers, block, 16))
        silu = {"gate_up": state, "out": state, "n": "i32", "row_stride": "i32"}
        examples.append((silu_mul_kernel, silu, {"BLOCK": _ACTIVATIONS}, 4))
    return examples
