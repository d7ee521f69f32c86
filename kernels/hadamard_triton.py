"""Triton kernels for products with matrices of ±1.

Sylvester's matrix of order Q · W is the Kronecker product of those of orders Q and W: W neighbours
go through a matrix unit, exactly since all factors are ±1, and Q blocks of them through additions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 8192  # of a program
_WIDEST = 32


@triton.jit
def sylvester_kernel(
    x: tl.tensor,
    out: tl.tensor,
    rows: int,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """(rows, D) contiguous times Sylvester's matrix."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    place = row * D + tl.arange(0, WIDTH)[None, :]
    parts: tl.tuple = ()
    for i in tl.static_range(D // WIDTH):
        parts += (tl.load(x + place + i * WIDTH, row < rows, 0.0),)
    parts = sums_of_signs(parts, signs_block(WIDTH, x.dtype.element_ty), SCALE)
    for i in tl.static_range(D // WIDTH):
        tl.store(out + place + i * WIDTH, parts[i], row < rows)


@triton.jit
def dense_kernel(
    x: tl.tensor,
    signs: tl.tensor,
    out: tl.tensor,
    rows: int,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """(rows, D) contiguous times any (D, D) int8 matrix; CHANNELS is D up to a power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, CHANNELS)[None, :]
    step = tl.arange(0, STEP)
    sums = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, D, STEP):
        inner = first + step
        part = tl.load(x + row * D + inner[None, :], (row < rows) & (inner[None, :] < D), 0.0)
        inside = (inner[:, None] < D) & (column < D)
        factor = tl.load(signs + inner[:, None] * D + column, inside, 0).to(part.dtype)
        sums = tl.dot(part, factor, sums, input_precision="ieee")
    tl.store(
        out + row * D + column, (sums * SCALE).to(x.dtype.element_ty), (row < rows) & (column < D)
    )


@triton.jit
def sums_of_signs(parts: tl.tuple, signs: tl.tensor, SCALE: tl.constexpr) -> tl.tuple:
    """Blocks (rows, W) of neighbours times Sylvester's matrix and SCALE, in their own dtype.

    `signs` is the factor of order W. Sums are float32.
    """
    COUNT: tl.constexpr = len(parts)
    sums: tl.tuple = ()
    for i in tl.static_range(COUNT):
        sums += (tl.dot(parts[i], signs, input_precision="ieee"),)
    for stage in tl.static_range(9):
        if 2**stage < COUNT:
            sums = _butterfly(sums, 2**stage, COUNT)
    rounded: tl.tuple = ()
    for i in tl.static_range(COUNT):
        rounded += ((sums[i] * SCALE).to(parts[i].dtype),)
    return rounded


@triton.jit
def _butterfly(sums: tl.tuple, APART: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """Sums and differences of blocks APART from each other."""
    turned: tl.tuple = ()
    for i in tl.static_range(COUNT):
        if i & APART == 0:
            turned += (sums[i] + sums[i ^ APART],)
        else:
            turned += (sums[i ^ APART] - sums[i],)
    return turned


@triton.jit
def signs_block(W: tl.constexpr, DTYPE: tl.constexpr) -> tl.tensor:
    """Sylvester's matrix of order W, at most 256: -1 to the number of ones in i & j."""
    ones = tl.arange(0, W)[:, None] & tl.arange(0, W)[None, :]
    ones ^= ones >> 4
    return (1 - 2 * ((0x6996 >> (ones & 15)) & 1)).to(DTYPE)


def hadamard(x: Tensor, scale: float, signs: Tensor | None) -> Tensor:
    """(..., D) times a matrix of ±1; see `kvbench.kernels.hadamard`."""
    size = x.shape[-1]
    x = x.contiguous()
    out, rows = torch.empty_like(x), x.numel() // size
    if not rows:
        return out
    if signs is None:
        width, block, warps = tile(size)
        grid = (triton.cdiv(rows, block),)
        sylvester_kernel[grid](x, out, rows, scale, size, width, block, num_warps=warps)
        return out
    channels = triton.next_power_of_2(size)
    dense_kernel[triton.cdiv(rows, 32),](
        x, signs.to(torch.int8).contiguous(), out, rows, scale, size, channels, 32, 32, num_warps=4
    )
    return out


def tile(size: int) -> tuple[int, int, int]:
    """Neighbours in a block, rows of a program, and warps."""
    return min(size, _WIDEST), max(_NUMBERS // size, 16), 4


def compile_examples() -> list[tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Kernels with signature, constants and warps, for ahead-of-time compilation."""
    pair = {"x": "*fp16", "out": "*fp16", "rows": "i32"}
    constants = dict(SCALE=0.088, D=128, WIDTH=32, ROWS=64)
    dense = dict(SCALE=0.1, D=80, CHANNELS=128, STEP=32, ROWS=32)
    return [
        (sylvester_kernel, pair, constants, 4),
        (dense_kernel, {**pair, "signs": "*i8"}, dense, 4),
    ]
