"""Packed storage of one side of a layer: a few append-only segments and the exact newest tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kvbench.cache.codecs import Exact
from kvbench.cache.contract import EXACT, Codec, LayerSpec, Side
from kvbench.cache.ragged import Lengths, Ragged, join
from kvbench.errors import UserError


class Segment:
    """Tokens of one precision, contiguous, append-only; codes are written once.

    `slots`, when tracked, holds each token's column in the sequence (int32, -1 for "before").
    """

    def __init__(self, codec: Codec, rows: int) -> None:
        """An empty segment of `rows` rows."""
        self.codec = codec
        self.parts: tuple[Ragged, ...] = ()
        self.slots: Ragged | None = None
        self.lengths: Lengths = (0,) * rows

    def append(self, states: Ragged, slots: Ragged | None) -> None:
        """Encode (B, H, n, C) states; each row's count is a multiple of the codec's block."""
        block = self.codec.block
        if any(count % block for count in states.lengths):
            raise UserError(
                f"groups of {block} tokens can't be cut from {states.lengths} tokens; the plan and "
                "the window must release whole groups."
            )
        counts = tuple(count // block for count in states.lengths)
        new = [Ragged(part, counts) for part in self.codec.encode(states.data)]
        old = self.parts or (None,) * len(new)
        self.parts = tuple(n if o is None else join((o, n)) for o, n in zip(old, new, strict=True))
        if slots is not None:
            self.slots = slots if self.slots is None else join((self.slots, slots))
        self.lengths = tuple(a + b for a, b in zip(self.lengths, states.lengths, strict=True))

    def read(self, dtype: torch.dtype) -> Ragged:
        """All tokens, decoded: (B, H, n, C)."""
        packed = tuple(part.data for part in self.parts)
        return Ragged(self.codec.decode(packed, dtype), self.lengths)

    def drop(self, counts: Lengths) -> None:
        """Forget the oldest counts[b] tokens of each row (block 1 only)."""
        left = tuple(a - b for a, b in zip(self.lengths, counts, strict=True))
        self.parts = tuple(part.slice(counts, left).owned() for part in self.parts)
        if self.slots is not None:
            self.slots = self.slots.slice(counts, left).owned()
        self.lengths = left

    def track(self, device: torch.device) -> None:
        """Start to keep slots; tokens that are already here came before."""
        if self.slots is None and max(self.lengths):
            shape = (len(self.lengths), 1, max(self.lengths))
            before = torch.full(shape, -1, dtype=torch.int32, device=device)
            self.slots = Ragged(before, self.lengths)

    def select(self, rows: Tensor) -> None:
        """Keep rows by index, repeats allowed."""
        self.parts = tuple(part.rows(rows) for part in self.parts)
        self.slots = None if self.slots is None else self.slots.rows(rows)
        self.lengths = tuple(self.lengths[i] for i in rows.tolist())

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor."""
        return sum(p.nbytes for p in self._tensors())

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's tokens."""
        return sum(p.row_nbytes(row) for p in self._tensors())

    def _tensors(self) -> tuple[Ragged, ...]:
        return self.parts if self.slots is None else (*self.parts, self.slots)


class SideStore:
    """Keys or values of one layer.

    New tokens enter `recent` in the stored basis, with the bits they were given; when they leave
    the window they move to the segment of these bits.
    """

    def __init__(self, side: Side, spec: LayerSpec, rows: int, name: str) -> None:
        """Empty storage.

        Raises:
            UserError: a codec can't store such vectors.
        """
        self.side = side
        self.name = name
        self.recent = Segment(Exact(), rows)
        codecs = {**dict(sorted(side.codecs.items())), EXACT: Exact()}
        for codec in codecs.values():
            codec.check(side.transform.stored_shape(spec)[1])
        self.segments = {bits: Segment(codec, rows) for bits, codec in codecs.items()}
        self._bits = Ragged(torch.empty(rows, 1, 0, dtype=torch.int8), (0,) * rows)
        self._prompt: Lengths | None = None

    @property
    def lengths(self) -> Lengths:
        """Tokens of each row."""
        parts = [s.lengths for s in (*self.segments.values(), self.recent)]
        return tuple(map(sum, zip(*parts, strict=True)))

    @property
    def packed_lengths(self) -> Lengths:
        """Tokens of each row that stand in segments below 16 bits."""
        packed = [s.lengths for bits, s in self.segments.items() if bits != EXACT]
        return tuple(map(sum, zip(*packed, strict=True))) or (0,) * len(self.recent.lengths)

    @property
    def waiting_bits(self) -> Ragged:
        """(B, 1, n) int8 on the host: bits that the tokens in the window will get."""
        return self._bits

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, the bits that tokens in the window wait for among them."""
        return self._bits.nbytes + sum(s.nbytes for s in (*self.segments.values(), self.recent))

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's tokens."""
        segments = (*self.segments.values(), self.recent)
        return self._bits.row_nbytes(row) + sum(s.row_nbytes(row) for s in segments)

    def append(self, states: Ragged, bits: Ragged, slots: Ragged | None) -> None:
        """Take (B, H', n, C) states in the stored basis; bits is (B, 1, n) int8 on the host."""
        if self._prompt is None:
            self._prompt = states.lengths
        if slots is not None:
            for segment in (*self.segments.values(), self.recent):
                segment.track(states.data.device)
        self.recent.append(states, slots)
        self._bits = join((self._bits, bits)) if max(self._bits.lengths) else bits

    def flush(self) -> None:
        """Move what left the window to its segment."""
        leave = self._leaving()
        if not max(leave):
            return
        start = (0,) * len(leave)
        states = self.recent.parts[0].slice(start, leave)
        slots = None if self.recent.slots is None else self.recent.slots.slice(start, leave)
        bits = self._bits.slice(start, leave)
        self._distribute(states, slots, bits)
        self.recent.drop(leave)
        left = self.recent.lengths
        self._bits = self._bits.slice(leave, left).owned()

    def read(self, dtype: torch.dtype) -> Ragged:
        """All tokens in the stored basis, a row's segments one after another."""
        return self._joined(lambda segment: segment.read(dtype))

    def slots(self) -> Ragged:
        """Slots (B, 1, n) in the order of `read`."""
        return self._joined(lambda segment: segment.slots)

    def forget_slots(self) -> None:
        """Stop tracking: later queries see everything that is stored now."""
        for segment in (*self.segments.values(), self.recent):
            segment.slots = None

    def select(self, rows: Tensor) -> None:
        """Keep rows by index, repeats allowed (beams)."""
        for segment in (*self.segments.values(), self.recent):
            segment.select(rows)
        self._bits = self._bits.rows(rows.cpu())
        if self._prompt is not None:
            self._prompt = tuple(self._prompt[i] for i in rows.tolist())

    def _joined(self, part: Callable[[Segment], Ragged | None]) -> Ragged:
        filled = [s for s in (*self.segments.values(), self.recent) if max(s.lengths)]
        return join([p for s in filled or [self.recent] if (p := part(s)) is not None])

    def _leaving(self) -> Lengths:
        window, held = self.side.window, self.recent.lengths
        if window is None:
            return held
        prompts = self._prompt or held
        kept = [window.keep(n, p) for n, p in zip(self.lengths, prompts, strict=True)]
        return tuple(max(a - b, 0) for a, b in zip(held, kept, strict=True))

    def _distribute(self, states: Ragged, slots: Ragged | None, bits: Ragged) -> None:
        values = bits.data[:, 0, : max(states.lengths)].numpy().tobytes()
        for target, counts, index in _partition(values, states.lengths, states.data.device):
            segment = self._segment(target)
            if index is None:
                segment.append(states, slots)
                continue
            chosen = None if slots is None else slots.taken(index, counts)
            segment.append(states.taken(index, counts), chosen)

    def _segment(self, bits: int) -> Segment:
        if bits not in self.segments:
            raise UserError(
                f"the plan asks for {bits}-bit {self.name}s but the method has codecs for "
                f"{sorted(self.segments)} bits only."
            )
        return self.segments[bits]


@lru_cache(maxsize=8)  # keys and values of a layer are mostly divided alike
def _partition(
    bits: bytes, lengths: Lengths, device: torch.device
) -> list[tuple[int, Lengths, Tensor | None]]:
    """Bits, how many tokens of each row have them, and which (B, most) int64; None: all of them.

    `bits` are int8, a row's beside each other. All is worked out on the host, where they are: the
    device is not waited for.
    """
    values = np.frombuffer(bits, np.int8).reshape(len(lengths), -1)
    mine = np.arange(values.shape[1]) < np.array(lengths)[:, None]
    parts: list[tuple[int, Lengths, Tensor | None]] = []
    for target in np.unique(values[mine]).tolist():
        mask = mine & (values == target)
        counts = tuple(mask.sum(1).tolist())
        index = None
        if counts != lengths:
            order = np.argsort(~mask, 1, kind="stable")[:, : max(counts)]
            index = torch.from_numpy(order.copy()).to(device, non_blocking=True)
        parts.append((target, counts, index))
    return parts
