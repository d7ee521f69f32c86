"""Decode attention in Triton: a program a row, key head, span and split.

Reading packed spans keeps a multiprocessor's arithmetic busy and exact spans its memory, so the
programs of a row's spans stand side by side in the grid and run at the same time: as many spans as
`kvbench.kernels.attention_launch.launches` puts together.

Codes go through shared memory packed and are unpacked in registers (attention_unpack_triton), where
tensor cores take them from (attention_steps_triton).
"""

# ruff: noqa: RUF005 - the compiler of kernels joins tuples, but does not unpack them.
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kvbench.kernels.attention_query_triton import for_codes, load_query, query_sums
from kvbench.kernels.attention_steps_triton import (
    NOTHING,
    Layouts,
    Shape,
    add_values,
    channel_scores,
    keys_of,
    own_tokens,
    products,
    shape_of,
    softmax_step,
    span_count,
    spread,
    store_result,
    stream_factors,
    token_scores,
    unfolded,
    values_of,
    weighed,
    zeros,
)
from kvbench.kernels.attention_unpack_triton import (
    INTEGER,
    Side,
    group_count,
    load_words,
    slice_count,
    slices_of,
    wrapped,
)


@triton.jit
def tile_range(
    length: tl.tensor,
    start: tl.tensor,
    split: tl.tensor,
    splits: int,
    ALIGN: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """First and last place of a split's tiles, and the token that stands at place 0.

    With groups along tokens, tiles begin where groups do, so the first may begin before the start.
    """
    before = start % SHAPE.tile if ALIGN else 0
    chunk = tl.cdiv(tl.cdiv(length + before, splits), SHAPE.tile) * SHAPE.tile
    low = split * chunk
    return low, tl.minimum(low + chunk, length + before), before


@triton.jit
def those_inside(
    tile: tl.tensor, before: tl.tensor, high: tl.tensor, KEYS: tl.constexpr, SHAPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which tokens of a tile are a split's: one by one, laid out as by `folded`, and by eights."""
    every, own = tl.arange(0, SHAPE.tile), own_tokens(SHAPE)
    inside, valid = tile + every < high, tile + own < high
    if KEYS.tokens > 0:  # the first tile may begin before the first token
        inside, valid = inside & (tile + every >= before), valid & (tile + own >= before)
    return inside, valid, (tile + every) // 8 * 8 < high


@triton.jit
def side_at(
    side: tl.tuple, row: tl.tensor, head: tl.tensor, SIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tuple, tl.tensor, tl.tensor]:
    """A side's pointers for one row and key head, its strides, start and capacity."""
    states, scale, zero, starts, capacity, strides, scale_strides, zero_strides = side
    states += row.to(tl.int64) * strides[0] + head * strides[1]
    if SIDE.bits < 16:
        scale += row.to(tl.int64) * scale_strides[0] + head * scale_strides[1]
        if SIDE.zero != 0:
            zero += row.to(tl.int64) * zero_strides[0] + head * zero_strides[1]
    start = 0
    if SIDE.starts:
        start = tl.load(starts + row) % capacity
    return states, strides[2], (scale, zero, scale_strides[2], zero_strides[2]), start, capacity


@triton.jit
def prepared(
    pointer: tl.tensor,
    heads: tl.tensor,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
    KIND: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple, tl.tensor]:
    """The query as loaded, as multiplied with keys, its groups' sums, and what scores lack."""
    whole = load_query(pointer, heads[None, :] < SHAPE.heads, KEYS, SHAPE.channels)
    slices = whole
    sums: tl.tuple = ()
    factor = tl.full(heads.shape, 1.0, tl.float32)
    if KEYS.bits == 16:
        slices = (whole[0].to(KIND),)
    elif KEYS.tokens == 0:
        slices, common = for_codes(whole, KEYS)
        sums = query_sums(slices, KEYS)
        factor = 1.0 / common
    return whole, slices, sums, factor


@triton.jit
def nothing_yet(
    VALUES: tl.constexpr, SHAPE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tuple, tl.tuple]:
    """The state before the first tile: largest score, denominator, sums of slices and of zeros."""
    ROWS: tl.constexpr = SHAPE.rows
    WIDTH: tl.constexpr = VALUES.width
    sums: tl.tuple = ()
    shares: tl.tuple = ()
    for _ in tl.static_range(slice_count(VALUES)):
        sums = sums + (tl.zeros([WIDTH, ROWS], tl.float32),)
    for _ in tl.static_range(group_count(VALUES)):
        shares = shares + (zeros(SHAPE),)
    return tl.full([ROWS], NOTHING, tl.float32), zeros(SHAPE), sums, shares


@triton.jit
def scores_of(
    query: tl.tuple,
    side: tl.tuple,
    tile: tl.tensor,
    before: tl.tensor,
    inside: tl.tensor,
    blocks: tl.tensor,
    KEYS: tl.constexpr,
    SHAPE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Folded products of `prepared`'s query with a tile of keys, in its units; and their rows."""
    whole, slices, sums, _ = query
    pointer, stride, meta, start, capacity = side
    rows = wrapped(tile - before + tl.arange(0, SHAPE.tile), start, capacity, KEYS.starts)
    words = load_words(pointer, rows, inside, stride, KEYS, False)
    keys = slices_of(words, KEYS, SHAPE.plain)
    if KEYS.bits == 16:
        scores = products(slices, keys, 0, KEYS, SHAPE)
    elif KEYS.tokens > 0:
        first = (tile - before + start) % capacity
        scores = channel_scores(whole, keys, meta, first, KEYS, SHAPE)
    else:
        scores = token_scores(slices, sums, keys, meta, rows, inside, blocks, KEYS, SHAPE)
    return scores, rows


# Splits follow the number of rows: one kernel serves a prompt's last micro-batch as well.
@triton.jit(do_not_specialize=("slots", "splits"), do_not_specialize_on_alignment=("column",))
def attend(
    query: tl.tuple,
    spans: tl.tuple,
    column: tl.tensor,
    limits: tl.tuple,
    out: tl.tuple,
    lse: tl.tuple,
    key_heads: int,
    slots: int,
    splits: int,
    SPANS: tl.constexpr,
) -> None:
    """Some spans, a split of one of them a program; grid (rows · key heads · slots,).

    query (B, Hq, D), out (B, Hq, slots, D) and lse (B, Hq, slots): a tensor and its strides but the
    last; a span's slots, one a split, stand behind those of the spans before it; lse is base two,
    or None if there's one slot in all. spans: see `attend_span`. column: the query's (B,), or None.
    limits: scaling, softcap, window. slots: of these spans; splits: of each, eight bits a span from
    the lowest on (compilers would specialise the numbers of a tuple). SPANS: `Layouts`.
    """
    program = tl.program_id(0)
    row, head = program // slots // key_heads, program // slots % key_heads
    slot = program % slots
    first = 0
    for i in tl.static_range(span_count(SPANS)):
        count = (splits >> 8 * i) & 255
        if (slot >= first) & (slot < first + count):
            attend_span(
                query,
                spans[i],
                column,
                limits,
                out,
                lse,
                row,
                head,
                slot,
                slot - first,
                count,
                keys_of(SPANS, i),
                values_of(SPANS, i),
                shape_of(SPANS, i),
            )
        first += count


@triton.jit
def attend_span(
    query: tl.tuple,
    span: tl.tuple,
    column: tl.tensor,
    limits: tl.tuple,
    out: tl.tuple,
    lse: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    slot: tl.tensor,
    split: tl.tensor,
    splits: int,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    SHAPE: tl.constexpr,
) -> None:
    """One split of one span for the query heads of one key head of one row.

    span: keys and values (see `side_at`), lengths (B,), and with a window the tokens' columns (B,
    N) and their stride.
    """
    keys, values, lengths, columns, columns_stride = span
    key, value = side_at(keys, row, head, KEYS), side_at(values, row, head, VALUES)
    length = tl.load(lengths + row)
    low, high, before = tile_range(length, key[3], split, splits, KEYS.tokens > 0, SHAPE)
    heads = tl.arange(0, SHAPE.rows) % (SHAPE.rows // SHAPE.streams)
    first = head * SHAPE.heads
    places = query[0] + row.to(tl.int64) * query[1] + (first + heads[None, :]) * query[2]
    question = prepared(places, heads, KEYS, SHAPE, key[0].dtype.element_ty)
    largest, total, sums, shares = nothing_yet(VALUES, SHAPE)
    oldest = tl.load(column + row) - limits[2] if SHAPE.window else 0
    TILE: tl.constexpr = SHAPE.tile
    every = tl.arange(0, TILE)
    for tile_start in tl.range(low, high, TILE, num_stages=SHAPE.stages):
        tile = tl.multiple_of(tile_start, TILE)
        inside, valid, blocks = those_inside(tile, before, high, KEYS, SHAPE)
        scores, rows = scores_of(question, key, tile, before, inside, blocks, KEYS, SHAPE)
        if SHAPE.window:
            seen = tl.load(columns + row * columns_stride + rows, mask=inside, other=0) > oldest
            valid = valid & spread(seen, SHAPE)
        scores = scores * (question[3] * limits[0])[:, None]
        p, decay, largest, total = softmax_step(scores, valid, largest, total, limits[1], SHAPE)
        rows = wrapped(tile - before + every, value[3], value[4], VALUES.starts)
        words = load_words(value[0], rows, inside, value[1], VALUES, True)
        if VALUES.bits == 16:
            operands = (unfolded(p.to(value[0].dtype.element_ty), SHAPE),)
        else:
            operands, shares = weighed(
                p, decay, shares, value[2], rows, inside, blocks, VALUES, SHAPE
            )
        sums = add_values(sums, decay, slices_of(words, VALUES, SHAPE.plain), operands, VALUES)
    weight, log = stream_factors(largest, total, SHAPE)
    answer = out[0] + row.to(tl.int64) * out[1] + first * out[2] + slot * out[3]
    store_result(answer, out[2], sums, shares, weight, VALUES, SHAPE)
    if lse[0] is not None:
        heads = tl.arange(0, SHAPE.rows // SHAPE.streams)
        logs = lse[0] + row * lse[1] + (first + heads) * lse[2] + slot
        tl.store(logs, log, mask=heads < SHAPE.heads)


@triton.jit
def merge(
    parts: tl.tensor,
    lse: tl.tensor,
    out: tl.tensor,
    out_strides: tl.tuple,
    heads: int,
    slots: int,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Weigh parts (B, Hq, slots, D) by lse (B, Hq, slots), both contiguous; grid (B · Hq,)."""
    program = tl.program_id(0).to(tl.int64)
    slot, dims = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    log = tl.load(lse + program * slots + slot, mask=slot < slots, other=2 * NOTHING)
    weight = tl.exp2(log - tl.max(log, 0))
    weight = weight / tl.sum(weight, 0)
    inside = (slot < slots)[:, None] & (dims < D)[None, :]
    part = tl.load(
        parts + (program * slots + slot[:, None]) * D + dims[None, :], mask=inside, other=0.0
    )
    total = tl.sum(part * weight[:, None], 0)
    place_out = out + program // heads * out_strides[0] + program % heads * out_strides[1] + dims
    tl.store(place_out, total.to(out.dtype.element_ty), mask=dims < D)


def compile_examples() -> list[tuple[Any, dict[str, Any], dict[Any, Any], int]]:
    """Kernel, types of its arguments, constants and warps, for ahead-of-time compilation."""
    exact, tail = Side(16, words=128, width=128), Side(16, words=128, width=128, starts=True)
    packed = Side(2, 2, words=16, width=16, blocks=True)
    kivi = Side(2, 1, words=16, width=16, tokens=32, starts=True)
    groups = Side(4, 0, groups=4, parts=2, words=16, width=16)
    examples = [
        _example(((packed, packed),), 1, False),
        _example(((packed, groups), (exact, exact)), 4, True),
        _example(((kivi, tail), (tail, tail)), 1, False),
        _example(((exact, exact),), 7, True),
    ]
    types: dict[str, Any] = {"parts": "*fp32", "lse": "*fp32", "out": "*fp16"}
    types |= {"out_strides": ("i32", "i32"), "heads": "i32", "slots": "i32"}
    return [*examples, (merge, types, {"D": 128, "WIDTH": 128, "SLOTS": 8}, 1)]


def _example(
    sides: tuple[tuple[Side, Side], ...], heads: int, rich: bool
) -> tuple[Any, dict[str, Any], dict[Any, Any], int]:
    """A launch over spans of such keys and values; rich: with soft cap, window and log sums."""
    strides = ("i32", "i32", "i32")
    types: dict[str, Any] = {"query": ("*fp16", "i32", "i32"), "out": ("*fp16", *strides)}
    types |= {"limits": ("fp32", "fp32", "i32"), "key_heads": "i32", "slots": "i32"}
    types["splits"] = "i32"
    types |= {"column": "*i32" if rich else "constexpr"}
    types |= {"lse": ("*fp32" if rich else "constexpr", "i32", "i32")}
    constants: dict[Any, Any] = {} if rich else {(2,): None, (5, 0): None}
    spans = [(*map(_side_types, pair), "*i32", "*i32", "i32") for pair in sides]
    copies = triton.next_power_of_2(heads)
    shape = Shape(128, heads, 8, min(8 // copies, 4), 32, 3, rich, rich, False)
    constants["SPANS"] = Layouts(tuple((*pair, shape) for pair in sides))
    return attend, {**types, "spans": tuple(spans)}, constants, 1


def _side_types(side: Side) -> tuple[Any, ...]:
    strides = ("i32", "i32", "i32")
    states = "*fp16" if side.bits == 16 else "*i16"
    zero = "*i16" if side.zero == INTEGER.value else "*fp16"
    return states, "*fp16", zero, "*i32", "i32", strides, strides, strides
