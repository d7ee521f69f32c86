"""Where one new token's attention can read packed segments with the fused kernel, and how."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvbench.cache.codecs import Affine
from kvbench.cache.contract import EXACT, Codec, LayerQuantizer, Transform
from kvbench.cache.ragged import Lengths
from kvbench.cache.storage import Segment, SideStore
from kvbench.kernels.states import Span, States


def unfused(quantizer: LayerQuantizer) -> str | None:
    """Why a layer's storage can't be read by the kernel, or None if it can."""
    if quantizer.logit_maps:
        return "the logits of some tokens are changed before softmax"
    for side in (quantizer.key, quantizer.value):
        if side.pre_rope:
            return "keys are stored before rotary embedding"
        if type(side.transform).read is not Transform.read:
            return "heads are stored together"
        codecs = [codec for tier, codec in side.codecs.items() if tier != EXACT]
        if not all(map(is_even, [*codecs, *filter(None, [side.recent])])):
            return "its codec is not one of even groups with float16 metadata"
    return None


def attend_fused(
    query: Tensor, keys: SideStore, values: SideStore, scaling: float, softcap: float | None
) -> Tensor | None:
    """(B, Hq, 1, D) attended to all that is stored, or None if the rows don't lie that way.

    The caller knows that `unfused` has nothing to say and that no token is hidden by a window.
    """
    from kvbench.kernels.attention import decode_attention

    spans = _spans(keys, values, query.device)
    if spans is None:
        return None
    return decode_attention(query[:, :, 0], spans, scaling, softcap=softcap)[:, :, None]


def _spans(keys: SideStore, values: SideStore, device: torch.device) -> list[Span] | None:
    if keys.side.window == values.side.window:
        pairs = [(keys.segments[bits], values.segments[bits]) for bits in keys.segments]
        pairs.append((keys.recent, values.recent))
        return [
            Span(_states(k), _states(v), _ints(k.lengths, device))
            for k, v in pairs
            if max(k.lengths)
        ]
    return _in_order(keys, values, device)


def _in_order(keys: SideStore, values: SideStore, device: torch.device) -> list[Span] | None:
    """Tokens of one precision a side, in the order of the sequence; keys are packed first."""
    key, value, total = _packed_segment(keys), _packed_segment(values), keys.lengths
    if key is None or value is None:
        return None
    ahead = tuple(a - b for a, b in zip(key.lengths, value.lengths, strict=True))
    if min(ahead) < 0:
        return None
    newest = tuple(a - b for a, b in zip(total, key.lengths, strict=True))
    spans = []
    if max(value.lengths):
        spans.append(Span(_states(key), _states(value), _ints(value.lengths, device)))
    if max(ahead):
        starts = _ints(value.lengths, device)
        spans.append(Span(_states(key), _states(values.recent), _ints(ahead, device), starts))
    if max(newest):
        starts = _ints(ahead, device)
        recent = (_states(keys.recent), _states(values.recent))
        spans.append(Span(*recent, _ints(newest, device), value_starts=starts))
    return spans


def _packed_segment(store: SideStore) -> Segment | None:
    """The one segment that holds all that has left the window."""
    filled = [(bits, s) for bits, s in store.segments.items() if max(s.lengths)]
    if len(filled) > 1 or (filled and filled[0][0] == EXACT):
        return None
    return filled[0][1] if filled else next(iter(store.segments.values()))


def _states(segment: Segment) -> States:
    tensors = tuple(part.data for part in segment.parts)
    return segment.codec.states(tensors) if isinstance(segment.codec, Affine) else tensors[0]


def is_even(codec: Codec) -> bool:
    """Whether kernels can read what a codec stores."""
    return isinstance(codec, Affine) and codec.is_even


@lru_cache(maxsize=256)
def _ints(lengths: Lengths, device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32).to(device, non_blocking=True)
