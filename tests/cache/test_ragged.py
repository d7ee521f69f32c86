"""Rows of different lengths, held against plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbench.cache.ragged import Ragged, join, left_aligned, within

CPU = torch.device("cpu")


def ragged(rows: list[list[int]]) -> Ragged:
    """(B, 2, L, 1) int64: the second head has the numbers negated; padding is 999."""
    width = max(map(len, rows), default=0)
    padded = torch.tensor([row + [999] * (width - len(row)) for row in rows]).view(len(rows), width)
    return Ragged(torch.stack((padded, -padded), 1)[..., None], tuple(map(len, rows)))


def plain(x: Ragged) -> list[list[int]]:
    out = []
    for row, length in zip(x.data, x.lengths, strict=True):
        assert torch.equal(row[0, :length], -row[1, :length])
        out.append(row[0, :length, 0].tolist())
    return out


lists = st.lists(st.lists(st.integers(1, 99), max_size=5), min_size=2, max_size=2)


@given(st.lists(lists, min_size=1, max_size=4))
def test_join_puts_rows_behind_one_another(parts: list[list[list[int]]]) -> None:
    joined = plain(join([ragged(part) for part in parts]))
    assert joined == [[x for part in parts for x in part[row]] for row in range(2)]


@given(lists, st.data())
def test_slices_have_their_own_start_in_each_row(
    rows: list[list[int]], data: st.DataObject
) -> None:
    starts = tuple(data.draw(st.integers(0, len(row))) for row in rows)
    counts = tuple(
        data.draw(st.integers(0, len(row) - start)) for row, start in zip(rows, starts, strict=True)
    )
    expected = [row[s : s + c] for row, s, c in zip(rows, starts, counts, strict=True)]
    if max(map(len, rows)) == 0:
        return
    assert plain(ragged(rows).slice(starts, counts)) == expected


@given(lists, st.data())
def test_where_keeps_order(rows: list[list[int]], data: st.DataObject) -> None:
    width = max(map(len, rows))
    mask = torch.zeros(2, width, dtype=torch.bool)
    for row, values in enumerate(rows):
        for column in range(len(values)):
            mask[row, column] = data.draw(st.booleans())
    counts = tuple(mask.sum(1).tolist())
    expected = [
        [value for column, value in enumerate(values) if mask[row, column]]
        for row, values in enumerate(rows)
    ]
    assert plain(ragged(rows).where(mask, counts)) == expected


def test_padding_is_taken_out() -> None:
    x = ragged([[1, 2, 3], [4, 5, 6]])
    valid = torch.tensor([[False, True, True], [True, False, True]])
    assert plain(left_aligned(x.data, valid, (2, 2))) == [[2, 3], [4, 6]]
    assert left_aligned(x.data, torch.ones(2, 3, dtype=torch.bool), (3, 3)).data is x.data


def test_rows_may_repeat() -> None:
    assert plain(ragged([[1, 2], [3]]).rows(torch.tensor([1, 0, 1]))) == [[3], [1, 2], [3]]


def test_within_marks_each_rows_own() -> None:
    assert within((2, 0, 3), 3, CPU).tolist() == [
        [True, True, False],
        [False, False, False],
        [True, True, True],
    ]


def test_bytes_are_those_of_the_tensor_and_of_each_row() -> None:
    x = ragged([[1, 2, 3], [4]])
    assert x.nbytes == 2 * 2 * 3 * 8
    assert [x.row_nbytes(0), x.row_nbytes(1)] == [2 * 3 * 8, 2 * 1 * 8]


@pytest.mark.parametrize("count", [0, 3])
def test_small_views_let_large_tensors_go(count: int) -> None:
    large = torch.zeros(1, 2, 1000, 8)
    view = Ragged(large[:, :, 1000 - count :], (count,))
    assert view.owned().data.untyped_storage().nbytes() == view.nbytes
    whole = Ragged(large, (1000,))
    assert whole.owned() is whole
