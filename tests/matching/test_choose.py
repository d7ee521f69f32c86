"""Which setting is taken for a budget, and which fields are turned for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from kvbench.cache import check_fields
from kvbench.errors import UserError
from kvbench.evaluation.choices import MethodChoice, choose_methods
from kvbench.matching.choose import Absent, Sized, nearest, within_reach
from kvbench.matching.knobs import Candidate, candidates, size_knobs
from kvbench.matching.request import read_budgets
from kvbench.registry import METHODS


def sized(**settings: tuple[float, int]) -> list[Sized]:
    """Settings by spec: bits and number of changed fields."""
    return [
        Sized(Candidate("m", MethodChoice(spec, None), changes), bits)  # type: ignore[arg-type]
        for spec, (bits, changes) in settings.items()
    ]


def taken(budget: float, **settings: tuple[float, int]) -> str:
    found = nearest("m", sized(**settings), budget)
    return found.reason if isinstance(found, Absent) else found.candidate.choice.spec


def test_the_nearest_from_below() -> None:
    assert taken(2.75, a=(2.5, 0), b=(2.7, 2), c=(2.8, 0)) == "b"
    assert taken(2.75, a=(2.75, 1), b=(2.76, 0)) == "a"


def test_of_equally_near_ones_the_one_with_fewer_changes() -> None:
    assert taken(4.0, a=(3.99, 3), b=(3.97, 1), c=(3.94, 0)) == "b"
    assert taken(4.0, a=(3.98, 1), b=(3.97, 1)) == "a"


def test_why_there_is_none() -> None:
    assert taken(2.25, a=(2.5, 0), b=(3.0, 1)) == "stores at least 2.500 bits"
    assert taken(4.25, a=(2.5, 0), b=(4.5, 1)) == "stores 2.500 bits, then 4.500"
    assert taken(4.25, a=(2.5, 0)) == "stores 2.500 bits, nothing larger"
    assert taken(4.25) == "no setting fits this model's layers"


def test_estimates_around_every_budget_are_measured() -> None:
    many = sized(**{f"s{i}": (i / 10, 0) for i in range(20, 50)})
    found = sorted(one.bits for one in within_reach(many, (2.55, 4.0), below=2, above=1))
    assert found == [2.4, 2.5, 2.6, 3.9, 4.0, 4.1]


@dataclass(frozen=True)
class Declaring:
    """A method of one file that says itself what changes its size."""

    label: ClassVar[str] = "declaring"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"width": (3, 5), "kind": ("x", "y")}

    width: int = 4
    kind: str = "x"
    bits: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        if self.width == 5 and self.kind == "y":
            raise UserError("no such pair.")


def test_a_method_declares_its_own_knobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "get", lambda name: Declaring())
    named = MethodChoice("own", Declaring())  # type: ignore[arg-type]
    found = {(c.choice.spec, c.changes) for c in candidates(named)}
    assert found == {
        ("own", 0),
        ("own[width=3]", 1),
        ("own[width=5]", 1),
        ("own[kind=y]", 1),
        ("own[kind=y,width=3]", 2),
    }


def test_what_the_user_has_set_stays() -> None:
    (choice,) = choose_methods("akvq_vl[recent=16]")
    assert "recent" not in size_knobs(choice)
    assert all("recent=16" in c.choice.spec for c in candidates(choice))
    (free,) = choose_methods("akvq_vl")
    assert "recent" in size_knobs(free)


def test_shared_fields_are_turned_where_a_method_declares_none() -> None:
    (choice,) = choose_methods("smoothquant")
    assert set(size_knobs(choice)) == {"bits", "group_size"}
    assert not size_knobs(choose_methods("fp16")[0])


@pytest.mark.parametrize("name", METHODS.names())
def test_knobs_are_fields_and_every_value_is_taken_somewhere(name: str) -> None:
    method: Any = METHODS.get(name)
    declared = getattr(type(method), "size_knobs", {})
    values = {
        field: {getattr(c.choice.quantizer, field) for c in candidates(choose_methods(name)[0])}
        for field in declared
    }
    for field, wanted in declared.items():
        assert getattr(method, field) in values[field]
        if field in size_knobs(choose_methods(name)[0]):
            assert set(wanted) <= values[field], field


def test_budgets_as_typed() -> None:
    assert read_budgets("4.25, 2.25,2.25") == (2.25, 4.25)
    for text in ("two", "-1", "0", "nan", "inf"):
        with pytest.raises(UserError, match="--bits"):
            read_budgets(text)
