from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvbench.kernels.states import PackedStates, Span, taken

B, H, N, D = 4, 2, 6, 8
ROWS = slice(1, 3)


def packed(zero: Tensor | None) -> PackedStates:
    codes = torch.randint(0, 256, (B, H, N, D // 4), dtype=torch.uint8)
    return PackedStates(codes, torch.rand(B, H, N, 2).half(), zero, bits=2, group=D // 2)


@pytest.mark.parametrize("has_zero", [True, False])
def test_rows_of_packed_states_are_views_that_decode_alike(has_zero: bool) -> None:
    states = packed(torch.randn(B, H, N, 2).half() if has_zero else None)
    some = states[ROWS]
    assert torch.equal(some.dequantized(), states.dequantized()[ROWS])
    assert (some.bits, some.group, some.along) == (2, D // 2, "channels")
    some.codes.zero_()
    assert not states.codes[ROWS].any() and states.codes[3].any()


def test_rows_of_a_span_read_the_same_tokens() -> None:
    starts = [torch.arange(B, dtype=torch.int32) + first for first in (0, 2)]
    columns = torch.arange(B * N, dtype=torch.int32).reshape(B, N)
    lengths = torch.tensor([6, 5, 4, 3], dtype=torch.int32)
    span = Span(packed(None), torch.randn(B, H, N, D), lengths, *starts, columns)
    some = span[ROWS]
    assert some.lengths.tolist() == [5, 4]
    assert some.columns is not None and some.columns.tolist() == columns[1:3].tolist()
    for of, at, whole, places in (
        (some.keys, some.key_starts, span.keys, span.key_starts),
        (some.values, some.value_starts, span.values, span.value_starts),
    ):
        assert torch.equal(taken(of, at, 4), taken(whole, places, 4)[ROWS])


def test_rows_of_a_span_without_starts_or_columns_have_none() -> None:
    lengths = torch.full((B,), N, dtype=torch.int32)
    some = Span(torch.randn(B, H, N, D), packed(None), lengths)[ROWS]
    assert some.key_starts is some.value_starts is some.columns is None
