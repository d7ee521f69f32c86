"""Any sequence of what a layer does to its storage, held against plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvbench.cache import Side
from kvbench.cache.contract import EXACT, LayerSpec, Packed
from kvbench.cache.ragged import Ragged
from kvbench.cache.storage import SideStore
from kvbench.cache.windows import Residual, Sliding

HEADS, CHANNELS = 2, 3
SPEC = LayerSpec(0, 1, HEADS, HEADS, CHANNELS)


@dataclass(frozen=True)
class Stamp:
    """Keeps numbers in blocks of tokens and adds its bits a thousand times when they are read."""

    bits: int
    block: int = 1

    def check(self, channels: int) -> None:
        assert channels == CHANNELS

    def encode(self, x: Tensor) -> Packed:
        return (x.unflatten(2, (-1, self.block)).clone(), x[:, :, :: self.block].clone())

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        assert torch.equal(packed[0][:, :, :, 0], packed[1])
        return packed[0].flatten(2, 3).to(dtype) + 1000 * self.bits

    def bits_per_element(self, channels: int) -> float:
        return float(self.bits)


@dataclass
class Token:
    number: int
    bits: int
    slot: int


@dataclass
class Row:
    """One row as a user would describe it: tokens that wait, and a list for each precision."""

    recent: list[Token] = field(default_factory=list)
    segments: dict[int, list[Token]] = field(default_factory=dict)
    prompt: int | None = None
    settled: bool = False

    def flush(self, window: Any) -> None:
        """Let the oldest go as long as the window's rule says so."""
        if window is None:
            return self._release(len(self.recent))
        prompt = 0 if self.settled else self.prompt or 0
        self.settled = True
        if isinstance(window, Sliding):
            if not window.prompt:
                self._release(prompt)
            while len(self.recent) >= window.size + window.flush_every:
                self._release(window.flush_every)
            return None
        if window.prompt_block is not None:
            self._release(prompt - prompt % window.prompt_block)
        while len(self.recent) >= window.size:
            self._release(window.size)
        return None

    def _release(self, count: int) -> None:
        for token in self.recent[:count]:
            self.segments.setdefault(token.bits, []).append(token)
        del self.recent[:count]

    def copy(self) -> Row:
        segments = {bits: list(tokens) for bits, tokens in self.segments.items()}
        return Row(list(self.recent), segments, self.prompt, self.settled)

    def tokens(self) -> list[Token]:
        packed = [t for bits in sorted(self.segments) for t in self.segments[bits]]
        return packed + self.recent

    def numbers(self) -> list[int]:
        """What is read: tokens of a packed segment carry the stamp of their bits."""
        packed = [
            t.number + (1000 * bits if bits != EXACT else 0)
            for bits in sorted(self.segments)
            for t in self.segments[bits]
        ]
        return packed + [t.number for t in self.recent]


def settings(draw: st.DrawFn) -> tuple[Side, list[int]]:
    """A side and the bits that its plan may give."""
    block = draw(st.sampled_from([1, 1, 1, 2, 3]))
    if block > 1:
        size = block * draw(st.integers(1, 3))
        prompt_block = draw(st.none() | st.just(size))
        return Side({2: Stamp(2, block)}, window=Residual(size, prompt_block=prompt_block)), [2]
    bits = draw(st.lists(st.sampled_from([1, 2, 4, 8]), unique=True, max_size=3))
    sliding = st.builds(
        Sliding,
        st.integers(0, 6),
        flush_every=st.integers(1, 4),
        prompt=st.booleans(),
    )
    window = draw(sliding | sliding | sliding | st.builds(Residual, st.integers(1, 5)) | st.none())
    return Side({b: Stamp(b) for b in bits}, window=window), [*bits, EXACT]


class Pair:
    """A store and the lists that it is held against, doing the same."""

    def __init__(self, side: Side, rows: int) -> None:
        self.side, self.store = side, SideStore(side, SPEC, rows, "key")
        self.rows = [Row() for _ in range(rows)]
        self.made, self.tracked = 0, False

    def append(self, counts: list[int], bits: list[list[int]], track: bool) -> None:
        width = max(counts)
        states = torch.full((len(counts), HEADS, width, CHANNELS), 1e6)
        given, slots = (torch.full((len(counts), 1, width), -7) for _ in range(2))
        for row, count in enumerate(counts):
            for place in range(count):
                self.made += 1
                slot = len(self.rows[row].tokens()) if track else -1
                token = Token(self.made, bits[row][place], slot)
                self.rows[row].recent.append(token)
                for head in range(HEADS):
                    parts = [token.number + head / 4 + c / 16 for c in range(CHANNELS)]
                    states[row, head, place] = torch.tensor(parts)
                given[row, 0, place], slots[row, 0, place] = token.bits, token.slot
            if self.rows[row].prompt is None:
                self.rows[row].prompt = count
        lengths = tuple(counts)
        self.store.append(
            Ragged(states, lengths),
            Ragged(given.to(torch.int8), lengths),
            Ragged(slots.int(), lengths) if track else None,
        )
        self.tracked = track

    def flush(self) -> None:
        self.store.flush()
        for row in self.rows:
            row.flush(self.side.window)

    def select(self, rows: list[int]) -> None:
        self.store.select(torch.tensor(rows))
        self.rows = [self.rows[row].copy() for row in rows]

    def forget(self) -> None:
        self.store.forget_slots()
        self.tracked = False
        for row in self.rows:
            for token in row.tokens():
                token.slot = -1

    def check(self) -> None:
        read = self.store.read(torch.float32)
        assert read.lengths == self.store.lengths == tuple(len(r.tokens()) for r in self.rows)
        packed = tuple(sum(len(t) for b, t in r.segments.items() if b != EXACT) for r in self.rows)
        assert self.store.packed_lengths == packed
        waiting = self.store.waiting
        slots = self.store.slots() if self.tracked else None
        for index, row in enumerate(self.rows):
            data = read.data[index, :, : read.lengths[index]]
            expected = torch.tensor(row.numbers(), dtype=torch.float32)
            for head in range(HEADS):
                for channel in range(CHANNELS):
                    shifted = expected + head / 4 + channel / 16
                    assert torch.equal(data[head, :, channel], shifted)
            bits = waiting.data[index, 0, : waiting.lengths[index]].tolist()
            assert bits == [token.bits for token in row.recent]
            if slots is not None:
                found = slots.data[index, 0, : slots.lengths[index]].tolist()
                assert found == [token.slot for token in row.tokens()]
        self._check_bytes()

    def _check_bytes(self) -> None:
        """A row's bytes are those of its own tokens: a float a channel, one more for each block."""
        slot = 4 if self.tracked else 0
        for index, row in enumerate(self.rows):
            size = 4 * HEADS * CHANNELS
            whole = len(row.tokens()) * (size + slot) + len(row.recent)
            for bits, tokens in row.segments.items():
                block = self.side.codecs[bits].block if bits != EXACT else len(tokens) + 1
                whole += len(tokens) // block * size
            assert self.store.row_nbytes(index) == whole
        assert self.store.nbytes >= sum(map(self.store.row_nbytes, range(len(self.rows))))


@given(st.data())
def test_any_sequence_reads_as_plain_lists_do(data: st.DataObject) -> None:
    side, allowed = data.draw(st.composite(settings)())
    pair = Pair(side, data.draw(st.integers(1, 3)))
    tracks, prompt = data.draw(st.booleans()), True
    for _ in range(data.draw(st.integers(1, 12))):
        step = data.draw(st.sampled_from(["append", "append", "append", "select", "forget"]))
        rows = len(pair.rows)
        if step == "append" or prompt:
            counts = data.draw(
                st.lists(st.integers(1 if prompt else 0, 9), min_size=rows, max_size=rows)
                | st.just([1] * rows)
            )
            if max(counts) == 0:
                continue
            given = st.sampled_from(allowed)
            bits = [data.draw(st.lists(given, min_size=n, max_size=n)) for n in counts]
            pair.append(counts, bits, tracks)
            if prompt or data.draw(st.booleans()):
                pair.check()
                pair.flush()
            prompt = False
        elif step == "select":
            chosen = st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)
            pair.select(data.draw(chosen))
        else:
            pair.forget()
            tracks = data.draw(st.booleans())
        pair.check()
