"""Attention of one new token a row over spans of packed and exact states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.kernels.launch import use_triton, where_it_is
from kvbench.kernels.states import PackedStates, Span, States, states_of, taken

MAX_HEADS = 16
"""Query heads of a key head, for the kernels."""


def decode_attention(
    query: Tensor,
    spans: Sequence[Span],
    scaling: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    out: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Softmax attention over all tokens of all spans together: (B, Hq, D) in query's dtype.

    query is (B, Hq, D); key heads divide Hq. A row without tokens gives zeros. With `window`,
    `columns` (B,) int32 is each query's own column, and of a span that has columns only tokens with
    column > query's column - window are seen. `out`, of the result's shape, is written and
    returned. `splits` programs share the tokens of a row's head in each span (None: enough to fill
    the device). Products with codes are of float16 numbers, with exact states of their own dtype;
    sums are float32.
    CUDA tensors go through Triton where `unsupported` has no objection, others through `reference`.
    """
    spans = [span for span in spans if states_of(span.keys).shape[2]]
    out = torch.empty_like(query) if out is None else out
    if not spans:
        return out.zero_()
    if not use_triton(query) or unsupported(query, spans) is not None:
        return out.copy_(
            reference(query, spans, scaling, softcap=softcap, window=window, columns=columns)
        )
    from kvbench.kernels.attention_launch import Question, decode

    question = Question(query, scaling, softcap, window, columns)
    with where_it_is(query):
        decode(question, spans, out, split_counts(query, spans, splits))
    return out


def reference(
    query: Tensor,
    spans: Sequence[Span],
    scaling: float,
    *,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`decode_attention` in plain torch, in float32 or query's wider type. Synchronises."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits, values = [], []
    for span in spans:
        copies = query.shape[1] // states_of(span.keys).shape[1]
        width = max(int(span.lengths.max()), 1)
        seen = torch.arange(width, device=query.device) < span.lengths[:, None]
        if window is not None and columns is not None and span.columns is not None:
            column = taken(span.columns[:, None, :, None], span.key_starts, width)[:, 0, :, 0]
            seen = seen & (column > columns[:, None] - window)
        keys = taken(span.keys, span.key_starts, width).to(wide).repeat_interleave(copies, 1)
        scores = (query.to(wide)[:, :, None] @ keys.mT)[:, :, 0] * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        logits.append(scores.masked_fill(~seen[:, None], -torch.inf))
        states = taken(span.values, span.value_starts, width).to(wide)
        # What lies beyond a row's length may be anything.
        states = states.masked_fill(~seen[:, None, :, None], 0)
        values.append(states.repeat_interleave(copies, 1))
    weights = torch.cat(logits, -1).softmax(-1).nan_to_num(0.0)
    return (weights[:, :, None] @ torch.cat(values, 2))[:, :, 0].to(query.dtype)


def unsupported(query: Tensor, spans: Sequence[Span]) -> str | None:
    """One sentence on why the kernels can't read these spans, None if they can. No device work."""
    if query.dtype == torch.float64:
        return "The query is float64, and the kernels add up in float32."
    for span in spans:
        heads = query.shape[1] // states_of(span.keys).shape[1]
        if heads > MAX_HEADS:
            return f"{heads} query heads share a key head; the kernels take at most {MAX_HEADS}."
        for side, states in (("keys", span.keys), ("values", span.values)):
            reason = _unsupported_side(query.shape[-1], states)
            if reason is not None:
                return f"The {side} {reason}."
        if isinstance(span.values, PackedStates) and span.values.along == "tokens":
            return "The values have groups along tokens; the kernels take such groups in keys only."
    return None


def _unsupported_side(channels: int, states: States) -> str | None:
    if states_of(states).stride(-1) != 1:
        return "have a last dimension that isn't contiguous"
    if isinstance(states, Tensor):
        return None if states.is_floating_point() and channels >= 16 else "have too few channels"
    if states.scale.dtype != torch.float16:
        return f"have {str(states.scale.dtype).removeprefix('torch.')} scales instead of float16"
    words = channels * states.bits // 16
    if words * 16 != channels * states.bits or states.codes.stride(2) % 2:
        return f"pack {channels} channels into an odd number of bytes"
    if states.along == "tokens":
        if states.group < 16 or states.group & (states.group - 1):
            return f"have groups of {states.group} tokens, which isn't a power of two from 16 on"
        return None
    groups, planes = channels // states.group, 8 // states.bits
    if groups > 1 and groups % planes and planes % groups:
        return f"have {groups} groups a token, which don't match {planes} codes a byte"
    if groups > planes and words % (groups // planes):
        return f"have {groups} groups a token, which cut 16-bit words"
    return None


def split_counts(query: Tensor, spans: Sequence[Span], splits: int | None = None) -> list[int]:
    """How many programs share each span of a row's head; `splits` where it is given.

    Enough to fill the device, each with tokens enough to be worth its start. Programs that unpack
    codes take long: they are cut short, so that the last of them don't leave the device idle.

    Raises:
        ValueError: `splits` is above `MAX_SPLITS`, the most that a launch can tell of a span.
    """
    if splits is not None:
        if splits > MAX_SPLITS:
            raise ValueError(f"{splits} programs can't share a span: at most {MAX_SPLITS} can.")
        return [splits] * len(spans)
    programs = query.shape[0] * states_of(spans[0].keys).shape[1]
    device = torch.cuda.get_device_properties(query.device)
    wanted = PROGRAMS * device.multi_processor_count // programs
    return [_split_count(span, wanted) for span in spans]


def _split_count(span: Span, wanted: int) -> int:
    tokens = states_of(span.keys).shape[2]
    least = 1 if isinstance(span.keys, Tensor) else -(-tokens // MOST_TOKENS)
    return max(1, min(max(least, min(wanted, tokens // MIN_TOKENS)), MAX_SPLITS))


PROGRAMS = 8
"""Programs that a multiprocessor can run at once."""
MIN_TOKENS = 256
"""Tokens that a split should have at least."""
MOST_TOKENS = 1024
"""Tokens that a split of a packed span should have at most."""
MAX_SPLITS = 128
