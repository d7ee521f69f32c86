"""Packed storage of one side of a layer: a few append-only segments and the exact newest tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kvbench.cache.codecs import Exact
from kvbench.cache.contract import (
    DEFERRED,
    EVICTED,
    EXACT,
    Codec,
    LayerSpec,
    Packed,
    RankingWindow,
    Side,
    Transform,
)
from kvbench.cache.ragged import Lengths, Ragged, join, within
from kvbench.errors import UserError


class Segment:
    """Tokens of one tier, contiguous, append-only; codes are written once.

    `slots`, when tracked, holds each token's column in the sequence (int32, -1 for "before").
    """

    def __init__(self, codec: Codec, rows: int) -> None:
        """An empty segment of `rows` rows."""
        self.codec = codec
        self.parts: tuple[Ragged, ...] = ()
        self.slots: Ragged | None = None
        self.lengths: Lengths = (0,) * rows
        self._writes: list[Lengths] = []
        """Tokens of every write, where those of a write share metadata."""

    def append(self, states: Ragged, slots: Ragged | None) -> None:
        """Encode (B, H, n, C) states; each row's count is a multiple of the codec's block."""
        new = self._encoded(states)
        old = self.parts or (None,) * len(new)
        self.parts = tuple(n if o is None else join((o, n)) for o, n in zip(old, new, strict=True))
        if slots is not None:
            self.slots = slots if self.slots is None else join((self.slots, slots))
        self.lengths = tuple(a + b for a, b in zip(self.lengths, states.lengths, strict=True))

    def _encoded(self, states: Ragged) -> list[Ragged]:
        block, lengths = self.codec.block, states.lengths
        if block is None:
            self._writes.append(lengths)
            alike = len(set(lengths)) == 1
            packed = self.codec.encode(states.trimmed()) if alike else _alone(self.codec, states)
            once = tuple(min(count, 1) for count in lengths)
            return [
                Ragged(part, lengths if part.shape[2] == max(lengths) else once) for part in packed
            ]
        if any(count % block for count in lengths):
            raise UserError(
                f"groups of {block} tokens can't be cut from {lengths} tokens; the plan and "
                "the window must release whole groups."
            )
        counts = tuple(count // block for count in lengths)
        return [Ragged(part, counts) for part in self.codec.encode(states.data)]

    def read(self, dtype: torch.dtype) -> Ragged:
        """All tokens, decoded: (B, H, n, C)."""
        if len(self._writes) > 1:
            return join(list(self._each_write(dtype)))
        packed = tuple(part.data for part in self.parts)
        return Ragged(self.codec.decode(packed, dtype), self.lengths)

    def _each_write(self, dtype: torch.dtype) -> Iterator[Ragged]:
        """Decoded with the metadata of their write."""
        starts = [(0,) * len(self.lengths)] * len(self.parts)
        for lengths in self._writes:
            once = tuple(min(count, 1) for count in lengths)
            counts = [lengths if part.lengths == self.lengths else once for part in self.parts]
            cut = zip(self.parts, starts, counts, strict=True)
            packed = tuple(part.slice(start, count).data for part, start, count in cut)
            yield Ragged(self.codec.decode(packed, dtype), lengths)
            starts = [
                tuple(map(sum, zip(start, count, strict=True)))
                for start, count in zip(starts, counts, strict=True)
            ]

    def reorder(self, order: Tensor) -> None:
        """Put each row's tokens in the order of (B, n) int64 (block 1 only)."""
        self.parts = tuple(part.taken(order, part.lengths) for part in self.parts)
        if self.slots is not None:
            self.slots = self.slots.taken(order, self.slots.lengths)

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
        chosen = rows.tolist()
        self.lengths = tuple(self.lengths[i] for i in chosen)
        self._writes = [tuple(write[i] for i in chosen) for write in self._writes]

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
    """Keys or values of one layer; what is a row here is a head of a row where heads are apart.

    New tokens enter `recent` in the stored basis, with the tier they were given; when they leave
    the window they move to the segment of this tier.
    """

    def __init__(self, side: Side, spec: LayerSpec, rows: int, name: str) -> None:
        """Empty storage.

        Raises:
            UserError: a codec can't store such vectors.
        """
        self.side, self.name = side, name
        self.transform: Transform = side.transform
        self.recent = Segment(side.recent or Exact(), rows)
        codecs = {**dict(sorted(side.codecs.items())), EXACT: Exact()}
        for codec in (*codecs.values(), self.recent.codec):
            codec.check(side.transform.stored_shape(spec)[1])
        self.segments = {tier: Segment(codec, rows) for tier, codec in codecs.items()}
        self.scores: Ragged | None = None
        """(B, 1, n) float32 attention that the tokens in a ranking window have drawn."""
        self._tiers = Ragged(torch.empty(rows, 1, 0, dtype=torch.int8), (0,) * rows)
        self._prompt: Lengths | None = None
        self._dropped: Lengths = (0,) * rows
        """Tokens that were evicted when they left the window."""
        self._dtype = torch.float32

    @property
    def lengths(self) -> Lengths:
        """Tokens that each row holds."""
        parts = [s.lengths for s in self._all]
        return tuple(map(sum, zip(*parts, strict=True)))

    @property
    def packed_lengths(self) -> Lengths:
        """Tokens of each row that are stored in fewer than 16 bits."""
        packed = [s.lengths for tier, s in self.segments.items() if tier != EXACT]
        packed += [self.recent.lengths] if self.side.recent else []
        return tuple(map(sum, zip(*packed, strict=True))) or (0,) * len(self.recent.lengths)

    @property
    def waiting(self) -> Ragged:
        """(B, 1, n) int8 on the host: tiers that the tokens in the window will get."""
        return self._tiers

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, with the tiers that tokens in the window wait for."""
        scores = self.scores.nbytes if self.scores else 0
        return self._tiers.nbytes + scores + sum(s.nbytes for s in self._all)

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's tokens."""
        scores = self.scores.row_nbytes(row) if self.scores else 0
        return self._tiers.row_nbytes(row) + scores + sum(s.row_nbytes(row) for s in self._all)

    def append(
        self, states: Ragged, tiers: Ragged, slots: Ragged | None, scores: Ragged | None = None
    ) -> None:
        """Take (B, H', n, C) states in the stored basis; tiers is (B, 1, n) int8 on the host."""
        if self._prompt is None:
            self._prompt, self._dtype = states.lengths, states.data.dtype
        if slots is not None:
            for segment in self._all:
                segment.track(states.data.device)
        self.recent.append(states, slots)
        self._tiers = join((self._tiers, tiers)) if max(self._tiers.lengths) else tiers
        if scores is not None:
            self.scores = join((self.scores, scores)) if self.scores else scores

    @property
    def leaving(self) -> Lengths:
        """How many tokens of each row the window no longer holds."""
        window, held = self.side.window, self.recent.lengths
        if window is None:
            return held
        kept = [window.keep(*counts) for counts in self._counts]
        return tuple(max(a - b, 0) for a, b in zip(held, kept, strict=True))

    def ranked(self) -> Tensor | None:
        """(B, n) int64, the order in which a ranking window lets its tokens go; None: by age.

        First those that leave now, by age, then the others.
        """
        window, scores, leave = self.side.window, self.scores, self.leaving
        if not isinstance(window, RankingWindow) or scores is None or not max(leave):
            return None
        newest = [window.newest(*counts) for counts in self._counts]
        old = tuple(max(a - b, 0) for a, b in zip(self.recent.lengths, newest, strict=True))
        known = scores.data[:, 0]
        ranks = known.masked_fill(~within(old, known.shape[1], known.device), torch.inf)
        rank = ranks.argsort(dim=1, stable=True).argsort(1)
        leaves = rank < torch.tensor(leave).to(known.device, non_blocking=True)[:, None]
        return (~leaves).long().argsort(dim=1, stable=True)

    def reorder(self, order: Tensor) -> None:
        """Put the tokens in the window in another order, (B, n) int64."""
        self.recent.reorder(order)
        if self.scores is not None:
            self.scores = self.scores.taken(order, self.scores.lengths)
        if self._tiers.data.numel() and bool((self._tiers.data != self._tiers.data[0, 0, 0]).any()):
            self._tiers = self._tiers.taken(order.cpu(), self._tiers.lengths)

    @property
    def undecided(self) -> bool:
        """Whether a token that is about to leave has no tier yet."""
        width = max(self.leaving)
        return bool((self._tiers.data[:, :, :width] == DEFERRED).any())

    def settle(self, tiers: Tensor) -> None:
        """Give the tokens about to leave (B, n) int8 tiers, where theirs were deferred."""
        waiting = self._tiers.data.clone()
        part = waiting[:, 0, : tiers.shape[1]]
        part[:] = torch.where(part == DEFERRED, tiers, part)
        self._tiers = Ragged(waiting, self._tiers.lengths)

    def flush(self) -> None:
        """Move what left the window to its segment."""
        leave = self.leaving
        if not max(leave):
            return
        start = (0,) * len(leave)
        states = self.recent.read(self._dtype).slice(start, leave)
        slots = None if self.recent.slots is None else self.recent.slots.slice(start, leave)
        self._distribute(states, slots, self._tiers.slice(start, leave))
        self.recent.drop(leave)
        left = self.recent.lengths
        self._tiers = self._tiers.slice(leave, left).owned()
        if self.scores is not None:
            self.scores = self.scores.slice(leave, left).owned()

    def read(self, dtype: torch.dtype) -> Ragged:
        """All tokens in the stored basis, a row's segments one after another."""
        return self._joined(lambda segment: segment.read(dtype))

    def slots(self) -> Ragged:
        """Slots (B, 1, n) in the order of `read`."""
        return self._joined(lambda segment: segment.slots)

    @property
    def has_slots(self) -> bool:
        """Whether columns are tracked."""
        return any(segment.slots is not None for segment in self._all)

    def places(self, tier: int, device: torch.device) -> Tensor:
        """(B, n) bool in the order of `read`: packed tokens of a tier."""
        before = tuple(
            sum(s.lengths[row] for of, s in self.segments.items() if of in self._ahead(tier))
            for row in range(len(self.lengths))
        )
        ends = tuple(map(sum, zip(before, self.segments[tier].lengths, strict=True)))
        width = max(self.lengths)
        return within(ends, width, device) & ~within(before, width, device)

    def forget_slots(self) -> None:
        """Stop tracking: later queries see everything that is stored now."""
        for segment in self._all:
            segment.slots = None

    def select(self, rows: Tensor) -> None:
        """Keep rows by index, repeats allowed (beams)."""
        for segment in self._all:
            segment.select(rows)
        self._tiers = self._tiers.rows(rows.cpu())
        if self.scores is not None:
            self.scores = self.scores.rows(rows)
        self._dropped = tuple(self._dropped[i] for i in rows.tolist())
        if self._prompt is not None:
            self._prompt = tuple(self._prompt[i] for i in rows.tolist())

    @property
    def _all(self) -> tuple[Segment, ...]:
        return (*self.segments.values(), self.recent)

    @property
    def _counts(self) -> list[tuple[int, int]]:
        """Tokens of each row that ever were in the window, and those of its prompt."""
        taken = map(sum, zip(self.lengths, self._dropped, strict=True))
        return list(zip(taken, self._prompt or self.recent.lengths, strict=True))

    def _ahead(self, tier: int) -> set[int]:
        tiers = list(self.segments)
        return set(tiers[: tiers.index(tier)])

    def _joined(self, part: Callable[[Segment], Ragged | None]) -> Ragged:
        filled = [s for s in self._all if max(s.lengths)]
        return join([p for s in filled or [self.recent] if (p := part(s)) is not None])

    def _distribute(self, states: Ragged, slots: Ragged | None, tiers: Ragged) -> None:
        values = tiers.data[:, 0, : max(states.lengths)].numpy().tobytes()
        for target, counts, index in _partition(values, states.lengths, states.data.device):
            if target == EVICTED:
                self._dropped = tuple(map(sum, zip(self._dropped, counts, strict=True)))
                continue
            segment = self._segment(target)
            if index is None:
                segment.append(states, slots)
                continue
            chosen = None if slots is None else slots.taken(index, counts)
            segment.append(states.taken(index, counts), chosen)

    def _segment(self, tier: int) -> Segment:
        if tier not in self.segments:
            raise UserError(
                f"the plan asks for {tier}-bit {self.name}s but the method has codecs for "
                f"{sorted(self.segments)} bits only."
            )
        return self.segments[tier]


def _alone(codec: Codec, states: Ragged) -> Packed:
    """Rows of unequal lengths encoded one by one, so that no padding enters what they share."""
    packed = {
        row: codec.encode(states.data[row : row + 1, :, :count])
        for row, count in enumerate(states.lengths)
        if count
    }
    parts = []
    for tensors in zip(*packed.values(), strict=True):
        shape = list(tensors[0].shape)
        shape[0], shape[2] = len(states.lengths), max(tensor.shape[2] for tensor in tensors)
        parts.append(tensors[0].new_zeros(shape))
        for row, tensor in zip(packed, tensors, strict=True):
            parts[-1][row, :, : tensor.shape[2]] = tensor[0]
    return tuple(parts)


@lru_cache(maxsize=8)  # keys and values of a layer are mostly divided alike
def _partition(
    tiers: bytes, lengths: Lengths, device: torch.device
) -> list[tuple[int, Lengths, Tensor | None]]:
    """Tiers, how many tokens of each row have them, and which (B, most) int64; None: all of them.

    `tiers` are int8, a row's beside each other. All is worked out on the host, where they are: the
    device is not waited for.
    """
    values = np.frombuffer(tiers, np.int8).reshape(len(lengths), -1)
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
