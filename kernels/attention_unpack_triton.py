"""How decode attention reads one side of a span: codes to fp16 in registers, metadata, positions.

Two neighbouring bytes of a token are one 16-bit word, and two words fill a register, as a pair of
fp16 numbers does. A field of b bits, left where it stands among the low ten bits of a word, *is* an
fp16 number: the subnormal code · 2^(place - 24). Tensor cores multiply subnormals exactly, so one
`and` unpacks two codes, and one shift by six brings the upper bits of a word down. The power of two
goes into the query (keys) or the result (values).

Field i of word w holds channel (i mod P) · D / P + 2w + i div P, with P = 8 / bits codes a byte.
A slice is one field of a part of the words: the operand of one matrix product.
"""

# ruff: noqa: RUF005 - the compiler of kernels joins tuples, but does not unpack them.
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

SYMMETRIC = tl.constexpr(0)
INTEGER = tl.constexpr(1)
FLOAT = tl.constexpr(2)


class Side(NamedTuple):
    """What a kernel knows of keys or values when it is compiled."""

    bits: int
    """Of a code; 16 stands for exact states of any float type."""
    zero: int = 0
    groups: int = 1
    """A token's groups of channels."""
    parts: int = 1
    """Parts of a token's words, so that a slice never crosses groups."""
    words: int = 128
    """Words of a part; channels if exact."""
    width: int = 128
    """`words` rounded up to a power of two of at least 16."""
    tokens: int = 0
    """Size of groups along tokens; 0: groups are along channels."""
    starts: bool = False
    blocks: bool = False
    """Rows can be read in blocks of eight: the capacity is a multiple of eight, without starts."""


@triton.constexpr_function
def slice_count(side: Side) -> int:
    """Fields of all parts."""
    return side.parts * (16 // side.bits)


@triton.constexpr_function
def group_count(side: Side) -> int:
    """A token's groups."""
    return side.groups


@triton.constexpr_function
def place(j: int, side: Side) -> int:
    """The bit at which slice j's field stands in a word, or in one shifted by six if above ten."""
    bit = side.bits * (j % (16 // side.bits))
    return bit if bit + side.bits <= 10 else bit - 6


@triton.constexpr_function
def top(side: Side) -> int:
    """The highest place of all slices."""
    return 10 - side.bits


@triton.constexpr_function
def group_of(j: int, side: Side) -> int:
    """The group, of those of a token, to which slice j belongs."""
    if side.bits == 16:
        return 0
    part, i = divmod(j, 16 // side.bits)
    planes = 8 // side.bits
    return ((i % planes) * side.parts + part) * side.groups // (planes * side.parts)


@triton.constexpr_function
def first_channel(j: int, side: Side) -> int:
    """The channel that word 0 of slice j holds; the next words hold every other one from there."""
    if side.bits == 16:
        return 0
    part, i = divmod(j, 16 // side.bits)
    planes, words = 8 // side.bits, side.parts * side.words
    return i % planes * 2 * words + 2 * part * side.words + i // planes


@triton.jit
def channels_of(j: tl.constexpr, SIDE: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """(words,) the channel that each word of slice j holds; D where there is none."""
    words = tl.arange(0, SIDE.width)
    step: tl.constexpr = 1 if SIDE.bits == 16 else 2
    return tl.where(words < SIDE.words, first_channel(j, SIDE) + step * words, D)


@triton.jit
def shifted(words: tl.tensor, PLAIN: tl.constexpr) -> tl.tensor:
    """Words moved down by six bits; a neighbour's bits may come in above bit nine."""
    if PLAIN:
        down = words >> 6
    else:
        down = tl.inline_asm_elementwise(
            "shr.u32 $0, $1, 6;", "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    return down


@triton.jit
def field(
    words: tl.tensor, down: tl.tensor, j: tl.constexpr, SIDE: tl.constexpr, PLAIN: tl.constexpr
) -> tl.tensor:
    """Slice j of a part's words (down: shifted) as fp16 numbers code · 2^(place - 24)."""
    source = words if place(j, SIDE) == j % (16 // SIDE.bits) * SIDE.bits else down
    masks = tl.full(words.shape, (2**SIDE.bits - 1) * 2 ** place(j, SIDE), tl.int16)
    if PLAIN:
        masked = source & masks
    else:
        masked = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;",
            "=r,r,r",
            [source, masks],
            dtype=tl.int16,
            is_pure=True,
            pack=2,
        )
    return masked.to(tl.float16, bitcast=True)


@triton.jit
def slices_of(words: tl.tuple, SIDE: tl.constexpr, PLAIN: tl.constexpr) -> tl.tuple:
    """All slices (words, tokens) of a tile's words, a tuple; exact states as they are."""
    if SIDE.bits == 16:
        slices = words
    else:
        slices = ()
        for j in tl.static_range(slice_count(SIDE)):
            part = words[j * SIDE.bits // 16]
            slices = slices + (field(part, shifted(part, PLAIN), j, SIDE, PLAIN),)
    return slices


@triton.jit
def load_words(
    pointer: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    SIDE: tl.constexpr,
    ACROSS: tl.constexpr,
) -> tl.tuple:
    """Each part's words (tokens, words), or exact states, zero outside; ACROSS: (words, tokens)."""
    words = tl.arange(0, SIDE.width)
    axis: tl.constexpr = 0 if ACROSS else 1
    words, rows = tl.expand_dims(words, 1 - axis), tl.expand_dims(rows, axis)
    inside = tl.expand_dims(inside, axis)
    if SIDE.words != SIDE.width:
        inside = inside & (words < SIDE.words)
    places = pointer + rows * stride + words
    parts: tl.tuple = ()
    for part in tl.static_range(slice_count(SIDE) * SIDE.bits // 16):
        parts = parts + (tl.load(places + part * SIDE.words, mask=inside, other=0),)
    return parts


@triton.jit
def wrapped(
    index: tl.tensor, start: tl.tensor, capacity: tl.tensor, STARTS: tl.constexpr
) -> tl.tensor:
    """Rows in the buffer of tokens counted from a row's start."""
    if STARTS:
        index += start
        index = tl.where(index >= capacity, index - capacity, index)
    return index
