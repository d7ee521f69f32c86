"""Where a decode step puts things: counters of a static cache, on the device.

No length is ever known to the host, so that a captured step can be replayed while rows grow. Every
tensor is int32 and (B,), or (L, B) where layers differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvbench.cache.contract import EXACT, Window
from kvbench.efficiency.workload import LayerLayout

_ALIGNED = 4
"""Numbers: a layer's counters then begin at an address that kernels take as it is."""


@dataclass(frozen=True)
class Moves:
    """What the step does to one side of a layer."""

    slot: Tensor | None
    """(B,) where the new token goes; None: it is packed at once."""
    leaving: Tensor
    """(B,) bits of the token that leaves, 0 where none does."""
    places: Tensor
    """(B,) where in the store of these bits it goes."""


@dataclass(frozen=True)
class Reach:
    """Tokens to attend to: how many, and from where on in either side."""

    lengths: Tensor
    key_starts: Tensor | None = None
    value_starts: Tensor | None = None


class SharedWindow:
    """Keys and values leave one window together, each token to the store of its own bits.

    The window is a ring; exact tokens that left it (pivots) stand right before it in the same
    buffer, the latest first, so that both are one span.
    """

    def __init__(self, layouts: Sequence[LayerLayout], rows: int, device: torch.device) -> None:
        """Counters for `rows` rows, all empty."""
        self.ring = layouts[0].key.ring
        self.forever = layouts[0].generated == EXACT
        ints: Any = {"dtype": torch.int32, "device": device}
        self._exact = torch.tensor([[layout.key.exact] for layout in layouts], **ints)
        self._generated = torch.tensor([[layout.generated] for layout in layouts], **ints)
        precisions = sorted({bits for layout in layouts for bits in layout.key.packed})
        room = -(-rows // _ALIGNED) * _ALIGNED
        self.held = {
            bits: torch.zeros(len(layouts), room, **ints)[:, :rows] for bits in (*precisions, EXACT)
        }
        self.tokens = torch.zeros(rows, **ints)
        self.first = torch.zeros(rows, **ints)
        """The row's token that opened the ring."""
        self.waiting = torch.zeros(len(layouts), rows, self.ring, dtype=torch.int8, device=device)
        """Bits that tokens in the ring will get."""
        self._rooms = {
            bits: [layout.key.exact if bits == EXACT else layout.key.packed.get(bits, 0)
                   for layout in layouts]
            for bits in self.held
        }  # fmt: skip
        self.crowded = torch.zeros((), dtype=torch.bool, device=device)
        """Whether a prompt had more tokens of a precision than there is room for."""
        self._slot: Tensor | None = None

    @property
    def state(self) -> tuple[Tensor, ...]:
        """All counters."""
        return (*self.held.values(), self.tokens, self.first, self.waiting)

    def begin(self) -> None:
        """Make room for one more token in every row."""
        if self.forever:
            self._slot = (self.tokens - self.first)[None].expand(self._exact.shape[0], -1)
            self._leaving = self._places = torch.zeros_like(self._slot)
        elif self.ring:
            self._release()
        else:
            self._slot = None
            self._leave(self._generated.expand(-1, self.tokens.shape[0]))
        self._count = (self.tokens - self.first + 1).clamp_max(self.ring)

    def kept(self, window: Window | None, length: int) -> int:
        """Tokens of a prompt that go to the ring."""
        return length if self.forever else kept_tokens(window, length)

    def prompt_moves(self, layer: int, bits: Tensor) -> Moves:
        """Where the tokens of a prompt that leave the window go; bits (b, n) on the device.

        What there is no room for goes nowhere, and `fill` remembers that.
        """
        leaving, places = torch.zeros_like(bits, dtype=torch.int32), torch.zeros_like(bits).int()
        for precision, rooms in self._rooms.items():
            goes = bits == precision
            rank = goes.cumsum(1, dtype=torch.int32) - 1
            place = rooms[layer] - 1 - rank if precision == EXACT else rank
            goes &= rank < rooms[layer]
            leaving.masked_fill_(goes, precision)
            places = torch.where(goes, place, places)
        return Moves(None, leaving, places)

    def fill(self, rows: slice, layer: int, bits: Tensor, leaving: int, _: int) -> None:
        """Count the prompts of some rows; bits (b, n) on the device, the first `leaving` packed."""
        length = bits.shape[1]
        self.tokens[rows] = length
        if not self.forever:
            self.first[rows] = leaving
            for precision, held in self.held.items():
                count = (bits[:, :leaving] == precision).sum(1, dtype=torch.int32)
                held[layer, rows] = count
                self.crowded |= (count > self._rooms[precision][layer]).any()
            self.waiting[layer, rows, : length - leaving] = bits[:, leaving:]
        self._count = self.tokens - self.first

    def _release(self) -> None:
        age = self.tokens - self.first
        slot = age % self.ring
        index = slot.long()[None, :, None].expand(self._exact.shape[0], -1, 1)
        waiting = self.waiting.gather(2, index).squeeze(2).int()
        self._leave(waiting * (age >= self.ring))
        generated = self._generated.to(torch.int8)[:, :, None].expand_as(index)
        self.waiting.scatter_(2, index, generated)
        self._slot = self._exact + slot

    def _leave(self, leaving: Tensor) -> None:
        places = torch.zeros_like(leaving)
        for bits, held in self.held.items():
            goes = leaving == bits
            place = self._exact - 1 - held if bits == EXACT else held
            places = torch.where(goes, place, places)
            held += goes
        self._leaving, self._places = leaving.contiguous(), places

    def moves(self, layer: int) -> tuple[Moves, Moves]:
        """Of keys and of values."""
        slot = None if self._slot is None else self._slot[layer]
        both = Moves(slot, self._leaving[layer], self._places[layer])
        return both, both

    def reach(self, layer: int, bits: int) -> Reach:
        """Tokens of a precision, 16 for the exact ones."""
        if bits != EXACT:
            return Reach(self.held[bits][layer])
        if self.forever:
            return Reach(self._count)
        held = self.held[EXACT][layer]
        start = self._exact[layer] - held
        return Reach(held + self._count, start, start)

    def end(self) -> None:
        """Count the token."""
        self.tokens += 1

    def packed_tokens(self) -> Tensor:
        """() int64: tokens below 16 bits that a step attends to, over layers and rows."""
        packed = [held.sum() for bits, held in self.held.items() if bits != EXACT]
        return torch.stack(packed).sum() if packed else self.tokens.sum() * 0


class ResidualKeys:
    """Keys are packed in blocks, when their buffer is full; values leave a ring one by one (KIVI).

    Tokens stand in order on both sides. Values never run ahead of keys.
    """

    def __init__(self, layouts: Sequence[LayerLayout], rows: int, device: torch.device) -> None:
        """Counters for `rows` rows, all empty; the same in every layer."""
        layout = layouts[0]
        self._layers, self.block, self.ring = len(layouts), layout.key.ring, layout.value.ring
        self._bits = layout.generated
        ints: Any = {"dtype": torch.int32, "device": device}
        self.tokens, self.first, self.keys, self.values = (
            torch.zeros(rows, **ints) for _ in range(4)
        )

    @property
    def state(self) -> tuple[Tensor, ...]:
        """All counters."""
        return self.tokens, self.first, self.keys, self.values

    def begin(self) -> None:
        """Make room for one more token in every row."""
        age = self.tokens - self.first
        leaves = age >= self.ring
        none = torch.zeros_like(age)
        self._key = Moves(self.tokens - self.keys, none, none)
        self._value = Moves(age % self.ring, leaves * self._bits, self.values.clone())
        self.values += leaves
        total = self.tokens + 1
        self._reach(total)
        self.flush = (total - self.keys == self.block) * self.block
        """(B,) keys to pack after attention."""

    def kept(self, window: Window | None, length: int) -> int:
        """Tokens of a prompt that go to the buffer or the ring."""
        return kept_tokens(window, length)

    def fill(self, rows: slice, layer: int, bits: Tensor, keys: int, values: int) -> None:
        """Count the prompts of some rows, of which so many keys and values are packed."""
        self.tokens[rows] = bits.shape[1]
        self.keys[rows] = keys
        self.first[rows] = self.values[rows] = values
        self._reach(self.tokens)

    def _reach(self, total: Tensor) -> None:
        between = (self.values - self.first) % self.ring
        newest = (self.keys - self.first) % self.ring
        self.spans = (
            Reach(self.values.clone()),
            Reach(self.keys - self.values, self.values.clone(), between),
            Reach(total - self.keys, None, newest),
        )
        """Both packed; keys packed, values exact; both exact."""

    def moves(self, layer: int) -> tuple[Moves, Moves]:
        """Of keys and of values."""
        return self._key, self._value

    def end(self) -> None:
        """Count the token and what was packed."""
        self.tokens += 1
        self.keys += self.flush

    def packed_tokens(self) -> Tensor:
        """() int64: tokens with packed keys that a step attends to, over layers and rows."""
        return self.keys.sum() * self._layers


def kept_tokens(window: Window | None, length: int) -> int:
    """Tokens of a prompt that a window keeps."""
    return 0 if window is None else window.keep(length, length)


Schedule = SharedWindow | ResidualKeys
