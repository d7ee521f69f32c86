"""Sentences about other people's code."""

from __future__ import annotations

import pytest
import torch

from kvbench.errors import Mistake, fault
from kvbench.evaluation.failures import check_faults, failure


def raised(work: object) -> Exception:
    with pytest.raises(Exception) as told:
        work()  # type: ignore[operator]
    return told.value


def test_a_fault_has_the_last_place_outside_of_libraries() -> None:
    inside = raised(lambda: torch.nn.Linear(2, 3)(torch.zeros(5)))
    assert fault(inside).startswith("RuntimeError: mat1 and mat2")
    assert f", {__file__}:" in fault(inside)
    assert fault(ValueError("two\nlines")) == "ValueError: two lines"
    assert fault(KeyError()) == "KeyError"


def test_what_a_row_says() -> None:
    assert failure(MemoryError()) == ("oom", "MemoryError")
    assert failure(torch.OutOfMemoryError("too much\nfor it")) == ("oom", "too much")
    assert failure(ValueError("odd")) == ("error", "ValueError: odd")
    with pytest.raises(Mistake, match="known"):
        failure(Mistake("known"))


def test_all_methods_are_told_of_at_once() -> None:
    check_faults([])
    with pytest.raises(Mistake) as told:
        check_faults([("a", "X, f:1"), ("b", "Y"), ("a", "Z")])
    assert str(told.value) == (
        "a failed 2 times (X, f:1); b failed once (Y): repair what is named there, and the same "
        "command runs only what is missing"
    )
