"""Triton kernel that quantizes and packs states.

A program takes a few tokens of one head. Their D channels come as blocks of WIDTH neighbours: codes
that share a byte stand at the same place of different blocks, so packing is arithmetic within a
thread. A group along channels is a run of blocks or an equal part of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.hadamard_triton import signs_block, sums_of_signs
from kvbench.kernels.rounding import Rounding
from kvbench.kernels.rounding_triton import (
    bounded,
    code_shift,
    metadata,
    shifted_codes,
)
from kvbench.kernels.states import PackedStates

_NUMBERS = 8192  # of a program, unless one group along tokens has more
_MOST_NUMBERS = 32768
_REPEAT = 4
_CONTIGUOUS: tl.constexpr = tl.constexpr(2)
_WIDEST, _WIDEST_BY_TOKENS, _NARROWEST = 32, 16, 4
_NARROWEST_DOT = 16


@dataclass(frozen=True)
class Tile:
    """The part of a head that a program takes."""

    width: int
    """Neighbours in a block."""
    unit: int
    """Tokens that belong together: a group along tokens, never 1, else 1."""
    side: int
    """Rows for them: `unit` up to a power of two."""
    rows: int
    repeat: int
    """Tiles that a program takes one after another."""
    warps: int


@triton.jit
def quantize_kernel(
    x: tl.tuple,
    codes: tl.tuple,
    scale: tl.tuple,
    zero: tl.tuple,
    counts: tl.tensor,
    sources: tl.tensor,
    destinations: tl.tensor,
    tokens: int,
    heads: int,
    programs: int,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    CLIP: tl.constexpr,
    MIDPOINT: tl.constexpr,
    ROTATE: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    REPEAT: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
) -> None:
    """REPEAT tiles of one head, of `programs` programs; `Tile` has the other constants.

    A tensor is a tuple: pointer, strides of rows, heads and tokens (x: of channels, too).
    """
    row, head, program = position(heads, programs, HEADS_FIRST)
    STEP: tl.constexpr = ROWS // SIDE * UNIT
    BY_TOKENS: tl.constexpr = UNIT == GROUP
    RUN: tl.constexpr = 1 if BY_TOKENS or GROUP < WIDTH else GROUP // WIDTH
    line = tl.arange(0, ROWS)[:, None]
    within = line // SIDE * UNIT + line % SIDE
    groups = tl.arange(0, ROWS // SIDE)[:, None]
    count = tokens if counts is None else tl.load(counts + row)
    destination = 0 if destinations is None else tl.load(destinations + row)
    signs = signs_block(WIDTH, x[0].dtype.element_ty) if ROTATE else None
    start = program * (REPEAT * STEP)
    for first in range(start, tl.minimum(count, start + REPEAT * STEP), STEP):
        token = first + within
        inside = (token < count) & (line % SIDE < UNIT)
        blocks = _load(x, row, head, token, tokens, sources, inside, D, WIDTH, BY_TOKENS)
        if ROTATE:
            blocks = sums_of_signs(blocks, signs, D**-0.5)
        target = destination + first
        planes: tl.tuple = ()
        for run in tl.static_range(0, D // WIDTH, RUN):
            low, high = _ends(blocks, run, RUN, line % SIDE < UNIT, GROUP, SIDE, BY_TOKENS)
            step, origin = metadata(low, high, BITS, ZERO, CLIP, MIDPOINT)
            group, kept = target // UNIT + groups, first + groups * UNIT < count
            _store_metadata(scale, row, head, group, run // RUN, step, kept, BY_TOKENS)
            if ZERO != "symmetric":
                _store_metadata(zero, row, head, group, run // RUN, origin, kept, BY_TOKENS)
            shift = code_shift(origin, BITS, ZERO)
            for i in tl.static_range(run, run + RUN):
                block = _grouped(blocks[i].to(tl.float32), GROUP, SIDE, BY_TOKENS)
                planes += ((shifted_codes(block, step, origin, BITS, ZERO), shift),)
        _store_codes(codes, row, head, target + within, planes, inside, BITS, BY_TOKENS)


@triton.jit
def position(heads: int, tiles: int, HEADS_FIRST: tl.constexpr) -> tl.tuple:
    """Row, head and tile of a program; neighbours in memory run side by side."""
    place = tl.program_id(0)
    if HEADS_FIRST:
        return place // (heads * tiles), place % heads, place // heads % tiles
    return place // (heads * tiles), place // tiles % heads, place % tiles


@triton.jit
def base_of(tensor: tl.tuple, row: tl.tensor, head: tl.tensor) -> tl.tensor:
    """Where a head of a row starts."""
    return tensor[0] + row.to(tl.int64) * tensor[1] + head.to(tl.int64) * tensor[2]


@triton.jit
def _load(
    x: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    token: tl.tensor,
    tokens: int,
    sources: tl.tensor,
    inside: tl.tensor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_TOKENS: tl.constexpr,
) -> tl.tuple:
    """Blocks of neighbouring channels of some tokens, counted from the row's source on."""
    if sources is not None:
        token += tl.load(sources + row)
        token = tl.where(token >= tokens, token - tokens, token)
    base = base_of(x, row, head) + token.to(tl.int64) * x[3]
    blocks: tl.tuple = ()
    for i in tl.static_range(D // WIDTH):
        column = i * WIDTH + tl.arange(0, WIDTH)[None, :]
        places = base + column * x[4]
        if BY_TOKENS:
            # A thread then has many tokens of few channels, and few groups to compute metadata of.
            places = tl.max_contiguous(places, (1, _CONTIGUOUS))
        block = tl.load(places, inside, 0.0)
        if x[0].dtype.element_ty != tl.float16:
            block = bounded(block.to(tl.float32)).to(x[0].dtype.element_ty)
        blocks += (block,)
    return blocks


@triton.jit
def _store_codes(
    codes: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    place: tl.tensor,
    planes: tl.tuple,
    inside: tl.tensor,
    BITS: tl.constexpr,
    BY_TOKENS: tl.constexpr,
) -> None:
    """Bytes of a tile, from `shifted_codes` and `code_shift` of every block."""
    PLANES: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = len(planes) // PLANES
    ROWS: tl.constexpr = place.shape[0]
    WIDTH: tl.constexpr = planes[0][0].numel // ROWS
    base = base_of(codes, row, head) + place.to(tl.int64) * codes[3]
    for i in tl.static_range(BYTES):
        packed, shift = planes[i]
        for plane in tl.static_range(1, PLANES):
            packed += planes[i + plane * BYTES][0] << (BITS * plane)
            shift += planes[i + plane * BYTES][1] << (BITS * plane)
        packed = tl.reshape(packed - shift, (ROWS, WIDTH)).to(tl.uint8)
        places = base + i * WIDTH + tl.arange(0, WIDTH)[None, :]
        if BY_TOKENS:
            places = tl.max_contiguous(places, (1, _CONTIGUOUS))
        tl.store(places, packed, inside)


@triton.jit
def _ends(
    blocks: tl.tuple,
    FIRST: tl.constexpr,
    RUN: tl.constexpr,
    whole: tl.tensor,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    BY_TOKENS: tl.constexpr,
) -> tl.tuple:
    """Smallest and largest numbers of the groups of RUN blocks, float32, group axes of size 1."""
    low, high = blocks[FIRST], blocks[FIRST]
    for i in tl.static_range(FIRST + 1, FIRST + RUN):
        low = tl.minimum(low, blocks[i])
        high = tl.maximum(high, blocks[i])
    low = _grouped(tl.where(whole, low, float("inf")), GROUP, SIDE, BY_TOKENS)
    high = _grouped(tl.where(whole, high, float("-inf")), GROUP, SIDE, BY_TOKENS)
    AXIS: tl.constexpr = 1 if BY_TOKENS else 2
    low, high = tl.min(low, AXIS, keep_dims=True), tl.max(high, AXIS, keep_dims=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _grouped(
    block: tl.tensor, GROUP: tl.constexpr, SIDE: tl.constexpr, BY_TOKENS: tl.constexpr
) -> tl.tensor:
    """A block (rows, WIDTH) with an axis for a group: the second by tokens, else the third."""
    ROWS: tl.constexpr = block.shape[0]
    WIDTH: tl.constexpr = block.shape[1]
    if BY_TOKENS:
        shaped = tl.reshape(block, (ROWS // SIDE, SIDE, WIDTH))
    elif GROUP < WIDTH:
        shaped = tl.reshape(block, (ROWS, WIDTH // GROUP, GROUP))
    else:
        shaped = tl.reshape(block, (ROWS, 1, WIDTH))
    return shaped


@triton.jit
def _store_metadata(
    tensor: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    place: tl.tensor,
    RUN: tl.constexpr,
    numbers: tl.tensor,
    kept: tl.tensor,
    BY_TOKENS: tl.constexpr,
) -> None:
    """Scales or zeros (A, 1, C) or (A, S, 1) of the RUN-th run of blocks."""
    A: tl.constexpr = numbers.shape[0]
    COUNT: tl.constexpr = numbers.shape[2] if BY_TOKENS else numbers.shape[1]
    column = RUN * COUNT + tl.arange(0, COUNT)[None, :]
    target = base_of(tensor, row, head) + place.to(tl.int64) * tensor[3] + column
    tl.store(target, tl.reshape(numbers, (A, COUNT)).to(tensor[0].dtype.element_ty), kept)


def fits(channels: int, rounding: Rounding) -> bool:
    """Whether states of so many channels can be quantized here."""
    return _tile(channels, rounding) is not None


def rotates(x: Tensor, rounding: Rounding) -> bool:
    """Whether they can be multiplied by Sylvester's matrix on the way."""
    tile = _tile(x.shape[3], rounding)
    return tile is not None and tile.width >= _NARROWEST_DOT


def quantize_into(
    x: Tensor,
    rounding: Rounding,
    out: PackedStates,
    counts: Tensor | None,
    sources: Tensor | None,
    destinations: Tensor | None,
    rotate: bool,
) -> None:
    """Quantize and pack; see `kvbench.kernels.quantize`."""
    rows, heads, tokens, channels = x.shape
    tile = _tile(channels, rounding)
    assert tile is not None
    programs = triton.cdiv(tokens, tile.rows // tile.side * tile.unit * tile.repeat)
    if not rows * heads * programs:
        return
    quantize_kernel[rows * heads * programs,](
        (x, *x.stride()),
        strided(out.codes),
        strided(out.scale),
        strided(out.scale if out.zero is None else out.zero),
        counts,
        sources,
        destinations,
        tokens,
        heads,
        programs,
        **_constants(channels, rounding, tile),
        ROTATE=rotate,
        HEADS_FIRST=x.stride(1) < x.stride(2),
        num_warps=tile.warps,
        num_stages=2,
        enable_fp_fusion=False,
    )


def _tile(channels: int, rounding: Rounding) -> Tile | None:
    """How to cut heads, or None if groups and bytes don't fit together."""
    by_tokens, group = rounding.along == "tokens", rounding.group
    width = power_of_two(channels * rounding.bits // 8)
    if by_tokens:
        width = min(width, _WIDEST_BY_TOKENS)
    if not by_tokens and group % width and width % group:
        width = power_of_two(group)
    unit = group if by_tokens else 1
    side = triton.next_power_of_2(unit)
    numbers = triton.next_power_of_2(channels)
    rows = side if by_tokens and side >= 16 else max(_NUMBERS // numbers, side, 16)
    if group == 1 or width < _NARROWEST or rows * numbers > _MOST_NUMBERS:
        return None
    warps = max(rows * numbers // (4096 if by_tokens else 2048), 1)
    return Tile(width, unit, side, rows, 1 if by_tokens else _REPEAT, warps)


def _constants(channels: int, rounding: Rounding, tile: Tile) -> dict[str, Any]:
    return dict(
        D=channels,
        BITS=rounding.bits,
        GROUP=rounding.group,
        ZERO=rounding.zero,
        CLIP=rounding.clip,
        MIDPOINT=rounding.clip_mode == "midpoint",
        WIDTH=tile.width,
        UNIT=tile.unit,
        SIDE=tile.side,
        ROWS=tile.rows,
        REPEAT=tile.repeat,
    )


def power_of_two(number: int) -> int:
    """The largest one, no more than `_WIDEST`, that divides a number."""
    return min(number & -number, _WIDEST)


def strided(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor and its strides of rows, heads and tokens."""
    return tensor, *tensor.stride()[:3]


def compile_examples() -> list[tuple[Any, dict[str, Any], dict[str, Any], int]]:
    """Kernel, types of its arguments, constants and warps, for ahead-of-time compilation."""
    strides = ("i32",) * 3
    packed = {"codes": ("*u8", *strides), "scale": ("*fp16", *strides)}
    numbers = dict.fromkeys(("tokens", "heads", "programs"), "i32")
    places = dict.fromkeys(("counts", "destinations"), "*i32")
    examples: list[tuple[Any, dict[str, Any], dict[str, Any], int]] = []
    for dtype, rotate, rounding in (
        ("fp16", True, Rounding(2, 128, "channels", "int", 0.8)),
        ("bf16", True, Rounding(4, 32, "channels", "float", 0.9, "midpoint")),
        ("fp32", False, Rounding(8, 8, "channels", "symmetric")),
        ("fp16", False, Rounding(2, 32, "tokens", "float")),
    ):
        tile = _tile(128, rounding)
        assert tile is not None
        zero = ("*i16" if rounding.zero == "int" else "*fp16", *strides)
        types = {"x": (f"*{dtype}", *strides, "i32"), "zero": zero} | packed | numbers | places
        constants = _constants(128, rounding, tile) | {"ROTATE": rotate, "HEADS_FIRST": True}
        examples.append((quantize_kernel, types, constants | {"sources": None}, tile.warps))
    return examples
