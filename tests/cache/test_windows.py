"""How many of the newest tokens stay exact, counted by hand."""

from __future__ import annotations

import pytest

from kvbench.cache import Residual, Sliding
from kvbench.errors import UserError


def test_sliding_keeps_the_newest() -> None:
    assert [Sliding(3).keep(length, 2) for length in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert [Sliding(0).keep(length, 2) for length in range(3)] == [0, 0, 0]


def test_sliding_releases_several_at_a_time() -> None:
    """The window is a floor: never fewer than `size`, never `flush_every` more."""
    kept = [Sliding(3, flush_every=4).keep(length, 0) for length in range(13)]
    assert kept == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4]


def test_sliding_may_leave_the_prompt_out() -> None:
    window = Sliding(3, prompt=False)
    assert [window.keep(length, 5) for length in range(5, 12)] == [0, 1, 2, 3, 3, 3, 3]


def test_residual_is_what_does_not_fill_a_block() -> None:
    assert [Residual(4).keep(length, 2) for length in range(10)] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_residual_may_quantize_the_prompt_in_smaller_blocks() -> None:
    """A prompt of 7 in blocks of 2 leaves 1; the buffer of 4 is full with 3 more."""
    window = Residual(4, prompt_block=2)
    assert [window.keep(length, 7) for length in range(7, 14)] == [1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("window", "values"),
    [(Sliding, dict(size=-1)), (Sliding, dict(size=4, flush_every=0)), (Residual, dict(size=0))],
)
def test_bad_windows_are_refused(window: type, values: dict[str, int]) -> None:
    with pytest.raises(UserError):
        window(**values)
