"""How spans are shared among launches, and what a launch is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench.kernels import attention_launch
from kvbench.kernels.attention_launch import Question, decode, launches
from kvbench.kernels.states import Span

H, D = 2, 128


def test_a_launch_takes_two_spans_at_most() -> None:
    assert [launches(count) for count in (1, 2, 3, 4)] == [
        [(0,)],
        [(0, 1)],
        [(0, 2), (1,)],
        [(0, 3), (1, 2)],
    ]


def test_rows_of_larger_tensors_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, tokens = 9, 17
    states = torch.randn(rows, H, tokens, D, dtype=torch.float16)
    numbers = torch.arange(3 * rows, dtype=torch.int32).view(3, rows)
    columns = torch.arange(rows * tokens, dtype=torch.int32).view(rows, tokens)
    span = Span(states, states, *numbers, columns)
    launched: list[tuple[Any, ...]] = []

    class Attend:
        def __getitem__(self, grid: object) -> Any:
            return lambda query, spans, *rest, **options: launched.append(spans[0])

    monkeypatch.setattr(attention_launch, "attend", Attend())
    for first in range(rows - 1):
        own = slice(first, first + 2)
        question = Question(torch.randn(2, H, D).half(), 1.0, window=9, columns=numbers[0, own])
        decode(question, [span[own]], torch.empty(2, H, D), [1])
    for first, (keys, values, *per_row) in enumerate(launched):
        given = (keys[3], values[3], *per_row[:2])
        expected = (*numbers[[1, 2, 0], first : first + 2], columns[first : first + 2])
        assert all(map(torch.equal, given, expected))
        assert not any(of.data_ptr() % 16 for of in given)
    assert len(launched) == rows - 1
