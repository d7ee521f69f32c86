"""The steps of decode attention over one tile of tokens, in registers.

The query heads of a key head seldom fill the eight rows that a tensor core's instruction has, so
the rows hold several copies of them, the streams, and each answers for its own part of a tile. No
row is idle then, the softmax works on no more numbers than there are, and each stream is a softmax
of its own until the end. Row n is stream n div (rows / streams), head n mod (rows / streams).
"""

# ruff: noqa: RUF005 - the compiler of kernels joins tuples, but does not unpack them.
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from kvbench.kernels.attention_query_triton import channel_scaled, for_codes
from kvbench.kernels.attention_unpack_triton import (
    FLOAT,
    INTEGER,
    Side,
    channels_of,
    group_count,
    group_of,
    place,
    slice_count,
)

LOG2E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-1e30)
# Probabilities times scales are rounded to fp16; this keeps those of small values normal numbers.
LIFT = tl.constexpr(32.0)


class Shape(NamedTuple):
    """What a kernel knows of a launch when it is compiled."""

    channels: int
    heads: int
    """Query heads of a key head."""
    rows: int
    streams: int
    tile: int
    """Tokens a step; a multiple of 8 · streams."""
    stages: int
    softcap: bool
    window: bool
    plain: bool
    """No inline assembly: for the interpreter and for GPUs that aren't NVIDIA's."""


@dataclass(frozen=True)
class Layouts:
    """Of all spans of a launch. No tuple: compilers would take it apart."""

    spans: tuple[tuple[Side, Side, Shape], ...]
    """Of each: keys, values and shape."""


@triton.constexpr_function
def span_count(layouts: Layouts) -> int:
    """How many spans there are."""
    return len(layouts.spans)


@triton.constexpr_function
def keys_of(layouts: Layouts, span: int) -> Side:
    """How the keys of a span are laid out."""
    return layouts.spans[span][0]


@triton.constexpr_function
def values_of(layouts: Layouts, span: int) -> Side:
    """How the values of a span are laid out."""
    return layouts.spans[span][1]


@triton.constexpr_function
def shape_of(layouts: Layouts, span: int) -> Shape:
    """How the reading of a span is cut."""
    return layouts.spans[span][2]


@triton.jit
def own_stream(SHAPE: tl.constexpr) -> tl.tensor:
    """(streams, 1, rows) whether a row belongs to a stream."""
    stream = tl.arange(0, SHAPE.rows) // (SHAPE.rows // SHAPE.streams)
    return (tl.arange(0, SHAPE.streams)[:, None] == stream[None, :])[:, None, :]


@triton.jit
def folded(scores: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """(tile, rows) to (rows, tile / streams): of each row the scores of its own tokens."""
    blocks = scores.reshape(SHAPE.streams, SHAPE.tile // SHAPE.streams, SHAPE.rows)
    return tl.sum(tl.where(own_stream(SHAPE), blocks, 0.0), 0).trans()


@triton.jit
def unfolded(weights: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """The inverse: (rows, tile / streams) to (tile, rows), zero for other rows' tokens."""
    blocks = tl.where(own_stream(SHAPE), weights.trans()[None, :, :], 0.0)
    return blocks.reshape(SHAPE.tile, SHAPE.rows)


@triton.jit
def own_tokens(SHAPE: tl.constexpr) -> tl.tensor:
    """(rows, tile / streams) the token of a tile for which each folded number stands."""
    FOLDED: tl.constexpr = SHAPE.tile // SHAPE.streams
    stream = tl.arange(0, SHAPE.rows) // (SHAPE.rows // SHAPE.streams)
    return stream[:, None] * FOLDED + tl.arange(0, FOLDED)[None, :]


@triton.jit
def spread(numbers: tl.tensor, SHAPE: tl.constexpr) -> tl.tensor:
    """(tile,) a number a token to (rows, tile / streams), as `folded` lays tokens out."""
    FOLDED: tl.constexpr = SHAPE.tile // SHAPE.streams
    COPIES: tl.constexpr = SHAPE.rows // SHAPE.streams
    blocks = numbers.reshape(SHAPE.streams, 1, FOLDED)
    blocks = tl.broadcast_to(blocks, [SHAPE.streams, COPIES, FOLDED])
    return blocks.reshape(SHAPE.rows, FOLDED)


@triton.jit
def load_meta(
    pointer: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    blocks: tl.tensor,
    g: tl.constexpr,
    SIDE: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """(rows, tile / streams) float32 metadata of group g of each token; zero outside.

    A mask that holds for whole blocks lets the load be wide and asynchronous.
    """
    numbers = tl.load(pointer + rows + g, mask=blocks if SIDE.blocks else inside, other=0)
    return spread(tl.where(inside, numbers, 0), SHAPE).to(tl.float32)


@triton.jit
def zeros(SHAPE: tl.constexpr) -> tl.tensor:
    """(rows, tile / streams) of nothing."""
    ROWS: tl.constexpr = SHAPE.rows
    FOLDED: tl.constexpr = SHAPE.tile // SHAPE.streams
    return tl.zeros([ROWS, FOLDED], tl.float32)


@triton.jit
def products(
    query: tl.tuple, keys: tl.tuple, g: tl.constexpr, KEYS: tl.constexpr, SHAPE: tl.constexpr
) -> tl.tensor:
    """Folded products of the query with the slices of one group of channels."""
    ROWS: tl.constexpr = SHAPE.rows
    TILE: tl.constexpr = SHAPE.tile
    scores = tl.zeros([TILE, ROWS], tl.float32)
    for j in tl.static_range(slice_count(KEYS)):
        if group_of(j, KEYS) == g:
            scores = tl.dot(keys[j], query[j], scores, input_precision="ieee")
    return folded(scores, SHAPE)


@triton.jit
def token_scores(
    query: tl.tuple,
    sums: tl.tuple,
    keys: tl.tuple,
    meta: tl.tuple,
    rows: tl.tensor,
    inside: tl.tensor,
    blocks: tl.tensor,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """Folded products with keys whose groups lie along channels; meta: pointers and strides."""
    scale, zero, scale_stride, zero_stride = meta
    total = zeros(SHAPE)
    for g in tl.static_range(group_count(KEYS)):
        scores = products(query, keys, g, KEYS, SHAPE)
        scales = load_meta(scale, rows * scale_stride, inside, blocks, g, KEYS, SHAPE)
        if KEYS.zero == FLOAT:
            add = load_meta(zero, rows * zero_stride, inside, blocks, g, KEYS, SHAPE)
            total += scores * scales + add * sums[g]
        elif KEYS.zero == INTEGER:
            add = load_meta(zero, rows * zero_stride, inside, blocks, g, KEYS, SHAPE)
            total += (scores - add * sums[g]) * scales
        else:
            total += (scores - sums[g] * 2 ** (KEYS.bits - 1)) * scales
    return total


@triton.jit
def channel_scores(
    query: tl.tuple,
    keys: tl.tuple,
    meta: tl.tuple,
    first: tl.tensor,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tl.tensor:
    """Folded products with keys whose groups lie along tokens: a tile is inside one group."""
    scale, zero, scale_stride, zero_stride = meta
    group = first // KEYS.tokens
    if KEYS.zero != 0:
        zero += group * zero_stride
    scaled, share = channel_scaled(query, scale + group * scale_stride, zero, KEYS, SHAPE.channels)
    slices, common = for_codes(scaled, KEYS)
    return products(slices, keys, 0, KEYS, SHAPE) / common[:, None] + share


@triton.jit
def softmax_step(
    scores: tl.tensor,
    valid: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    softcap: float,
    SHAPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax, base two: p, the decay of old sums, the new maximum and total."""
    if SHAPE.softcap:
        scores = softcap * (1 - 2 / (1 + tl.exp2(scores * (2 * LOG2E / softcap))))
    scores = tl.where(valid, scores * LOG2E, NOTHING)
    new = tl.maximum(largest, tl.max(scores, 1))
    decay = tl.exp2(largest - new)
    p = tl.where(valid, tl.exp2(scores - new[:, None]), 0.0)
    return p, decay, new, total * decay[:, None] + p


@triton.jit
def weighed(
    p: tl.tensor,
    decay: tl.tensor,
    offsets: tl.tuple,
    meta: tl.tuple,
    rows: tl.tensor,
    inside: tl.tensor,
    blocks: tl.tensor,
    VALUES: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Probabilities times scales, (tile, rows) a group, and the sums of what zeros add."""
    scale, zero, scale_stride, zero_stride = meta
    operands: tl.tuple = ()
    shares: tl.tuple = ()
    for g in tl.static_range(group_count(VALUES)):
        scales = load_meta(scale, rows * scale_stride, inside, blocks, g, VALUES, SHAPE)
        weight = (p * scales * LIFT).to(tl.float16)
        if VALUES.zero == FLOAT:
            add = load_meta(zero, rows * zero_stride, inside, blocks, g, VALUES, SHAPE)
            share = p * add * LIFT
        elif VALUES.zero == INTEGER:
            add = load_meta(zero, rows * zero_stride, inside, blocks, g, VALUES, SHAPE)
            share = -weight.to(tl.float32) * add
        else:
            share = weight.to(tl.float32) * -(2 ** (VALUES.bits - 1))
        operands = operands + (unfolded(weight, SHAPE),)
        shares = shares + (offsets[g] * decay[:, None] + share,)
    return operands, shares


@triton.jit
def add_values(
    sums: tl.tuple, decay: tl.tensor, values: tl.tuple, operands: tl.tuple, VALUES: tl.constexpr
) -> tl.tuple:
    """Decayed sums (words, rows) of every slice plus the values times their group's operand."""
    new: tl.tuple = ()
    for j in tl.static_range(slice_count(VALUES)):
        old = sums[j] * decay[None, :]
        operand = operands[group_of(j, VALUES)]
        new = new + (tl.dot(values[j], operand, old, input_precision="ieee"),)
    return new


@triton.jit
def stream_factors(
    largest: tl.tensor, total: tl.tensor, SHAPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(rows,) what to multiply each stream's sums by, and each head's log of the denominator."""
    copies: tl.constexpr = SHAPE.rows // SHAPE.streams
    total = tl.sum(total, 1).reshape(SHAPE.streams, copies)
    largest = largest.reshape(SHAPE.streams, copies)
    highest = tl.max(largest, 0)
    weight = tl.exp2(largest - highest[None, :])
    denominator = tl.sum(total * weight, 0)
    some = denominator > 0
    weight = tl.where(some[None, :], weight / tl.where(some, denominator, 1.0)[None, :], 0.0)
    lse = tl.where(some, highest + tl.log2(tl.where(some, denominator, 1.0)), NOTHING)
    return weight.reshape(SHAPE.rows), lse


@triton.jit
def store_result(
    pointer: tl.tensor,
    stride: tl.tensor,
    sums: tl.tuple,
    offsets: tl.tuple,
    factor: tl.tensor,
    VALUES: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """Write (heads, channels): the streams' sums times their factors (rows,), added up."""
    copies: tl.constexpr = SHAPE.rows // SHAPE.streams
    heads = tl.arange(0, copies)
    for j in tl.static_range(slice_count(VALUES)):
        numbers = sums[j]
        if VALUES.bits < 16:
            share = tl.sum(offsets[group_of(j, VALUES)], 1)[None, :]
            numbers = (numbers * 2.0 ** (24 - place(j, VALUES)) + share) * (1 / LIFT)
        numbers = (numbers * factor[None, :]).reshape(VALUES.width, SHAPE.streams, copies)
        dims = channels_of(j, VALUES, SHAPE.channels)
        tl.store(
            pointer + heads[None, :] * stride + dims[:, None],
            tl.sum(numbers, 1).to(pointer.dtype.element_ty),
            mask=(heads < SHAPE.heads)[None, :] & (dims < SHAPE.channels)[:, None],
        )
