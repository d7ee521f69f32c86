"""Launches of the decode-attention kernels. Imports Triton, so import this where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kvbench.kernels.attention_steps_triton import Layouts, Shape
from kvbench.kernels.attention_triton import attend, merge
from kvbench.kernels.attention_unpack_triton import FLOAT, INTEGER, SYMMETRIC, Side
from kvbench.kernels.states import Span, States, states_of

# The interpreter and AMD's compiler know no PTX.
PLAIN = not isinstance(attend, triton.JITFunction) or torch.version.hip is not None


class Tuning(NamedTuple):
    """How the reading of a span is cut: tokens a step, warps a program, stages."""

    tile: int
    warps: int
    stages: int


SHARED = {
    1: Tuning(64, 1, 3),
    2: Tuning(64, 1, 3),
    4: Tuning(64, 1, 2),
    8: Tuning(64, 1, 2),
    16: Tuning(32, 1, 3),
}
"""By the bits of a span's wider side. `kvbench bench tunings` found those of 2 and 4 bits on an
H200, 2 bits beside an exact span; 16 bits are an H100's, 1 and 8 bits take their neighbours'."""
ALONE = {**SHARED, 4: Tuning(64, 1, 4), 16: Tuning(16, 1, 3)}
"""The same where each query head has a key head of its own; 4 and 16 bits found on an H200."""


def tuning_of(span: Span, copies: int) -> Tuning:
    """The tuning for a span whose key heads serve `copies` query heads each."""
    bits = max(16 if isinstance(s, Tensor) else s.bits for s in (span.keys, span.values))
    return (ALONE if copies == 1 else SHARED)[bits]


@dataclass(frozen=True)
class Question:
    """What is asked of every span: see `kvbench.kernels.attention.decode_attention`."""

    query: Tensor
    scaling: float
    softcap: float | None = None
    window: int | None = None
    columns: Tensor | None = None


def decode(
    question: Question,
    spans: Sequence[Span],
    out: Tensor,
    splits: Sequence[int],
    tunings: Sequence[Tuning] | None = None,
) -> None:
    """Write the answer to out (B, Hq, D); the kernels must be able to read all spans.

    Each span's tokens are shared by so many `splits`.
    """
    rows, heads, channels = question.query.shape
    copies = heads // states_of(spans[0].keys).shape[1]
    tunings = tunings or [tuning_of(span, copies) for span in spans]
    slots = sum(splits)
    if slots == 1:
        _launch(question, spans, out[:, :, None], None, splits, tunings)
        return
    parts = out.new_empty((rows, heads, slots, channels), dtype=torch.float32)
    lse = out.new_empty((rows, heads, slots), dtype=torch.float32)
    first = 0
    for together in launches(len(spans)):
        own = slice(first, first + sum(splits[place] for place in together))
        _launch(
            question,
            [spans[place] for place in together],
            parts[:, :, own],
            lse[:, :, own],
            [splits[place] for place in together],
            [tunings[place] for place in together],
        )
        first = own.stop
    widths = triton.next_power_of_2(channels), triton.next_power_of_2(slots)
    merge[(rows * heads,)](
        parts, lse, out, out.stride()[:2], heads, slots, channels, *widths, num_warps=1
    )


def launches(spans: int) -> list[tuple[int, ...]]:
    """Which spans share a launch, by place: the first and the last, and so on to the middle.

    Programs of packed and of exact spans side by side keep both arithmetic and memory busy. The
    code of three kinds of span doesn't fit a multiprocessor's instruction cache: on an H200, one
    launch of 2, 4 and 16 bits took twice as long as two, most of it waiting for instructions.
    """
    return [tuple(sorted({place, spans - 1 - place})) for place in range((spans + 1) // 2)]


def _launch(
    question: Question,
    spans: Sequence[Span],
    out: Tensor,
    lse: Tensor | None,
    splits: Sequence[int],
    tunings: Sequence[Tuning],
) -> None:
    """Spans of one launch; out is (B, Hq, slots, D) and lse (B, Hq, slots)."""
    rows, heads, _ = question.query.shape
    key_heads = states_of(spans[0].keys).shape[1]
    attend[(rows * key_heads * out.shape[2],)](
        (question.query, *question.query.stride()[:2]),
        tuple(_span_arguments(span) for span in spans),
        question.columns if question.window is not None else None,
        (question.scaling, question.softcap or 0.0, question.window or 0),
        (out, *out.stride()[:3]),
        (None, 0, 0) if lse is None else (lse, *lse.stride()[:2]),
        key_heads,
        out.shape[2],
        sum(count << 8 * place for place, count in enumerate(splits)),
        Layouts(
            tuple(
                _layout(question, span, heads // key_heads, tuning)
                for span, tuning in zip(spans, tunings, strict=True)
            )
        ),
        num_warps=max(tuning.warps for tuning in tunings),
    )


def _span_arguments(span: Span) -> tuple[Any, ...]:
    """A span as the kernel takes it: any tensor for what isn't there."""
    lengths = _aligned(span.lengths)
    columns = lengths[:, None] if span.columns is None else _aligned(span.columns)
    return (
        _arguments(span.keys, span.key_starts, lengths),
        _arguments(span.values, span.value_starts, lengths),
        lengths,
        columns,
        columns.stride(0),
    )


def _aligned(numbers: Tensor) -> Tensor:
    """The same at an address that 16 divides: there's another compilation for those that aren't.

    Rows of a larger tensor, such as a micro-batch's, would need one after the other.
    """
    return numbers if numbers.data_ptr() % 16 == 0 else numbers.clone()


def _layout(
    question: Question, span: Span, copies: int, tuning: Tuning
) -> tuple[Side, Side, Shape]:
    """What the kernel knows of a span when it is compiled."""
    keys, values = side_of(span.keys, span.key_starts), side_of(span.values, span.value_starts)
    windowed = question.window is not None and span.columns is not None
    softcap, channels = question.softcap is not None, question.query.shape[2]
    return keys, values, cut(copies, channels, keys, tuning, softcap, windowed)


def _arguments(states: States, starts: Tensor | None, nothing: Tensor) -> tuple[Any, ...]:
    """A side as `side_at` takes it, codes as 16-bit words; `nothing` where there are no starts."""
    starts = nothing if starts is None else _aligned(starts)
    if isinstance(states, Tensor):
        no_strides = (0, 0, 0)
        tensors = states, states, states
        return *tensors, starts, states.shape[2], states.stride()[:3], no_strides, no_strides
    codes = states.codes.view(torch.int16)
    scale, zero = states.scale, states.scale if states.zero is None else states.zero
    strides = codes.stride()[:3], scale.stride()[:3], zero.stride()[:3]
    return codes, scale, zero, starts, codes.shape[2], *strides


def side_of(states: States, starts: Tensor | None) -> Side:
    """How a side is laid out."""
    if isinstance(states, Tensor):
        count = states.shape[-1]
        return Side(16, words=count, width=_width(count), starts=starts is not None)
    along_tokens = states.along == "tokens"
    groups = 1 if along_tokens else states.channels // states.group
    parts = max(1, groups * states.bits // 8)
    count = states.codes.shape[-1] // 2 // parts
    return Side(
        bits=states.bits,
        zero={"symmetric": SYMMETRIC, "int": INTEGER, "float": FLOAT}[states.zero_kind].value,
        groups=groups,
        parts=parts,
        words=count,
        width=_width(count),
        tokens=states.group if along_tokens else 0,
        starts=starts is not None,
        blocks=starts is None and states.codes.shape[2] % 8 == 0,
    )


def _width(words: int) -> int:
    return max(triton.next_power_of_2(words), 16)


def cut(
    heads: int, channels: int, keys: Side, tuning: Tuning, softcap: bool, window: bool
) -> Shape:
    """The compile-time shape of a launch; a tile never leaves a group of tokens."""
    copies = triton.next_power_of_2(heads)
    tile = min(tuning.tile, keys.tokens) if keys.tokens else tuning.tile
    rows = max(8, copies)
    streams = min(rows // copies, tile // 8)
    return Shape(channels, heads, rows, streams, tile, tuning.stages, softcap, window, PLAIN)
