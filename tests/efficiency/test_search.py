"""The search finds the largest batch under any limit and from any hint, with few tries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.efficiency.request import Status, TrialResult
from kvbench.efficiency.search import LARGEST, completed, largest_batch

Attempt = Callable[[int], TrialResult]


def under(limit: int, seen: list[int] | None = None) -> Attempt:
    """Batches up to `limit` complete."""

    def attempt(batch: int) -> TrialResult:
        assert batch >= 1
        if seen is not None:
            assert batch not in seen, "a batch was tried twice"
            seen.append(batch)
        return TrialResult("ok" if batch <= limit else "oom")

    return attempt


@given(st.integers(0, 3000), st.none() | st.integers(-3, 5000))
def test_any_limit_from_any_hint(limit: int, hint: int | None) -> None:
    seen: list[int] = []
    found = largest_batch(under(limit, seen), hint)
    assert (found.largest, found.out_of_memory_at) == (limit, limit + 1)
    assert found.tries == len(seen)
    assert not found.broken
    distance = limit if not hint else abs(max(hint, 1) - limit)
    assert found.tries <= 2 * math.log2(distance + 1) + 3


@given(st.integers(1, 3000), st.none() | st.integers(1, 5000), st.floats(0, 0.2))
def test_a_tolerance_bounds_the_gap(limit: int, hint: int | None, tolerance: float) -> None:
    found = largest_batch(under(limit), hint, tolerance)
    assert found.out_of_memory_at is not None
    assert found.largest <= limit < found.out_of_memory_at
    assert found.out_of_memory_at - found.largest <= max(1, tolerance * found.largest)


@given(st.integers(100, 1000), st.floats(-0.03, 0.03))
def test_a_good_hint_is_worth_it(limit: int, error: float) -> None:
    hint = round(limit * (1 + error))
    assert largest_batch(under(limit), hint, 0.01).tries <= 6


def test_a_perfect_hint_takes_two_tries() -> None:
    assert largest_batch(under(130), 130).tries == 2


@pytest.mark.parametrize("hint", [None, 7, 10 * LARGEST])
def test_without_a_limit_the_search_ends(hint: int | None) -> None:
    found = largest_batch(under(10 * LARGEST), hint)
    assert (found.largest, found.out_of_memory_at) == (LARGEST, None)


@pytest.mark.parametrize("status", ["failed", "timeout"])
def test_other_ends_stop_the_search(status: Status) -> None:
    seen: list[int] = []

    def attempt(batch: int) -> TrialResult:
        seen.append(batch)
        return TrialResult(status, "why") if batch >= 8 else TrialResult("ok")

    found = largest_batch(attempt)
    assert seen == [1, 2, 4, 8]
    assert (found.largest, found.out_of_memory_at, found.broken) == (4, None, True)
    assert (found.last.status, found.last.detail) == (status, "why")


@given(st.integers(0, 500), st.integers(1, 500))
def test_stepping_down(limit: int, batch: int) -> None:
    seen: list[int] = []
    reached, result, runs = completed(under(limit, seen), batch)
    assert runs == len(seen)
    assert seen == sorted(seen, reverse=True)
    assert reached <= limit
    assert result.status == ("ok" if limit else "oom")
    if batch <= limit:
        assert (reached, runs) == (batch, 1)


def test_stepping_down_ends_at_a_failure() -> None:
    def attempt(batch: int) -> TrialResult:
        return TrialResult("oom" if batch > 98 else "failed", "why")

    assert completed(attempt, 100) == (98, TrialResult("failed", "why"), 2)
