"""The query of decode attention, made ready to be multiplied with unpacked codes."""

# ruff: noqa: RUF005 - the compiler of kernels joins tuples, but does not unpack them.
from __future__ import annotations

import triton
import triton.language as tl

from kvbench.kernels.attention_unpack_triton import (
    FLOAT,
    INTEGER,
    channels_of,
    group_count,
    group_of,
    place,
    slice_count,
    top,
)


@triton.jit
def normalizer(largest: tl.tensor) -> tl.tensor:
    """The power of two that brings a positive number to between 32 and 64; 2^115 at most."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return ((259 - tl.maximum(exponent, 17)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_query(
    pointer: tl.tensor, inside: tl.tensor, KEYS: tl.constexpr, D: tl.constexpr
) -> tl.tuple:
    """The query's slices (words, rows) in float32."""
    slices: tl.tuple = ()
    for j in tl.static_range(slice_count(KEYS)):
        dims = channels_of(j, KEYS, D)
        mask = inside & (dims < D)[:, None]
        numbers = tl.load(pointer + dims[:, None], mask=mask, other=0.0)
        slices = slices + (numbers.to(tl.float32),)
    return slices


@triton.jit
def for_codes(slices: tl.tuple, KEYS: tl.constexpr) -> tuple[tl.tuple, tl.tensor]:
    """Query slices in fp16 times the powers of two that codes lack and a common one, (rows,)."""
    largest = tl.abs(slices[0])
    for j in tl.static_range(1, slice_count(KEYS)):
        largest = tl.maximum(largest, tl.abs(slices[j]))
    common = normalizer(tl.max(largest, 0))
    scaled: tl.tuple = ()
    for j in tl.static_range(slice_count(KEYS)):
        lack = common * 2.0 ** (top(KEYS) - place(j, KEYS))
        scaled = scaled + ((slices[j] * lack[None, :]).to(tl.float16),)
    return scaled, common * 2.0 ** (top(KEYS) - 24)


@triton.jit
def query_sums(slices: tl.tuple, KEYS: tl.constexpr) -> tl.tuple:
    """(rows, 1) sums over each group's channels of `for_codes`' query, in units of its codes.

    By tensor cores: a second use of the operands keeps the change of their layout out of the loop.
    """
    WIDTH: tl.constexpr = KEYS.width
    ROWS: tl.constexpr = slices[0].shape[1]
    sums: tl.tuple = ()
    for g in tl.static_range(group_count(KEYS)):
        total = tl.zeros([16, ROWS], tl.float32)
        for j in tl.static_range(slice_count(KEYS)):
            if group_of(j, KEYS) == g:
                units = tl.full([16, WIDTH], 2.0 ** (place(j, KEYS) - top(KEYS)), tl.float16)
                total = tl.dot(units, slices[j], total)
        sums = sums + (tl.max(total, 0)[:, None] * 2.0 ** (top(KEYS) - 24),)
    return sums


@triton.jit
def channel_scaled(
    slices: tl.tuple, scale: tl.tensor, zero: tl.tensor, KEYS: tl.constexpr, D: tl.constexpr
) -> tuple[tl.tuple, tl.tensor]:
    """Query slices times the scales (D,) of a group of tokens, and (rows, 1) the zeros' share."""
    scaled: tl.tuple = ()
    share = tl.zeros(slices[0].shape, tl.float32)
    for j in tl.static_range(slice_count(KEYS)):
        dims = channels_of(j, KEYS, D)
        times = slices[j] * tl.load(scale + dims, mask=dims < D, other=0)[:, None]
        if KEYS.zero == FLOAT:
            zeros = tl.load(zero + dims, mask=dims < D, other=0)
            share += slices[j] * zeros[:, None]
        elif KEYS.zero == INTEGER:
            zeros = tl.load(zero + dims, mask=dims < D, other=0)
            share -= times * zeros.to(tl.float32)[:, None]
        else:
            share -= times * 2 ** (KEYS.bits - 1)
        scaled = scaled + (times,)
    return scaled, tl.sum(share, 0)[:, None]
