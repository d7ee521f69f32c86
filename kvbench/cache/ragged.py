"""Rows of different lengths in one tensor, left-aligned, with the lengths on the host.

Every function has a fast path for rows of equal length, which is all that batch 1 ever takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Ragged:
    """(B, H, L, ...) data of which row b uses the first lengths[b] entries of dimension 2."""

    data: Tensor
    lengths: Lengths

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, padding included."""
        return self.data.numel() * self.data.element_size()

    def row_nbytes(self, row: int) -> int:
        """Bytes of the entries that a row uses."""
        return self.lengths[row] * (self.nbytes // max(self.data.shape[0] * self.data.shape[2], 1))

    def rows(self, index: Tensor) -> Ragged:
        """Rows by index, (B',) int64, repeats allowed."""
        lengths = tuple(self.lengths[i] for i in index.tolist())
        return Ragged(self.data.index_select(0, index.to(self.data.device)), lengths)

    def slice(self, starts: Lengths, counts: Lengths) -> Ragged:
        """counts[b] entries of row b from starts[b] on."""
        width = max(counts)
        if len(set(starts)) == 1 and len(set(counts)) == 1:
            return Ragged(self.data[:, :, starts[0] : starts[0] + width], counts)
        index = _slice_index(starts, width, self.data.shape[2], self.data.device)
        return Ragged(_take(self.data, index), counts)

    def trimmed(self) -> Tensor:
        """The tensor without columns that no row uses."""
        return self.data[:, :, : max(self.lengths)]

    def owned(self) -> Ragged:
        """A copy, if this is a small view that would keep a large tensor alive."""
        if self.data.untyped_storage().nbytes() > 2 * self.nbytes:
            return Ragged(self.data.clone(), self.lengths)
        return self

    def where(self, mask: Tensor, counts: Lengths) -> Ragged:
        """Entries where the (B, L) mask is True, in order; counts[b] = mask[b].sum()."""
        index = torch.argsort(~mask, dim=1, stable=True)[:, : max(counts)]
        return self.taken(index, counts)

    def taken(self, index: Tensor, counts: Lengths) -> Ragged:
        """Entries index[b, j], (B, most) int64 on the data's device, of row b for j < counts[b]."""
        return Ragged(_take(self.data, index), counts)


def join(parts: Sequence[Ragged]) -> Ragged:
    """Row by row concatenation along dimension 2."""
    parts = [p for p in parts if max(p.lengths)] or [parts[0]]
    if len(parts) == 1:
        return parts[0]
    lengths = tuple(map(sum, zip(*(p.lengths for p in parts), strict=True)))
    data = [p.data if p.data.shape[2] == max(p.lengths) else p.trimmed() for p in parts]
    if all(len(set(p.lengths)) == 1 for p in parts):
        return Ragged(torch.cat(data, 2), lengths)
    widths = tuple(d.shape[2] for d in data)
    index = _join_index(tuple(p.lengths for p in parts), widths, data[0].device)
    return Ragged(_take(torch.cat(data, 2), index), lengths)


def left_aligned(x: Tensor, valid: Tensor, counts: Lengths) -> Ragged:
    """(B, H, n, ...) with padding where the (B, n) mask is False, padding removed."""
    if min(counts) == x.shape[2]:
        return Ragged(x, counts)
    return Ragged(x, (x.shape[2],) * len(counts)).where(valid, counts)


def within(lengths: Lengths, width: int, device: torch.device) -> Tensor:
    """(B, width) bool, True where an entry belongs to its row."""
    ends = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(width, device=device) < ends[:, None]


def _take(data: Tensor, index: Tensor) -> Tensor:
    """data[b, :, index[b, j], ...] for every row b."""
    shape = (index.shape[0], 1, index.shape[1]) + (1,) * (data.dim() - 3)
    target = (*data.shape[:2], index.shape[1], *data.shape[3:])
    return data.gather(2, index.view(shape).expand(target))


@lru_cache(maxsize=256)
def _slice_index(starts: Lengths, width: int, limit: int, device: torch.device) -> Tensor:
    columns = torch.arange(width)[None] + torch.tensor(starts)[:, None]
    return columns.clamp_max(limit - 1).to(device, non_blocking=True)


@lru_cache(maxsize=256)
def _join_index(lengths: tuple[Lengths, ...], widths: Lengths, device: torch.device) -> Tensor:
    """Source columns of a row-wise concatenation inside the padded concatenation."""
    totals = [sum(row) for row in zip(*lengths, strict=True)]
    index = torch.zeros(len(totals), max(totals), dtype=torch.long)
    for row in range(len(totals)):
        place, start = 0, 0
        for part, width in zip(lengths, widths, strict=True):
            index[row, place : place + part[row]] = torch.arange(start, start + part[row])
            place, start = place + part[row], start + width
    return index.to(device, non_blocking=True)
