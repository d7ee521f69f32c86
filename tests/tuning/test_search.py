"""The search without a model: budget, what is run, and going on where it was killed."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from kvbench.errors import UserError
from kvbench.tuning.clusters import Cluster
from kvbench.tuning.objective import Outcome
from kvbench.tuning.search import Space, Tried, search
from kvbench.tuning.sensitivity import Sensitivity

BITS = {"eight": 8.0, "four": 4.0, "two": 2.0}
WEIGHT = (1.0, 10.0, 3.0)
"""How much the bits of each cluster matter."""


def space(budget: float = 5.0) -> Space:
    clusters = [Cluster(layers, tuple(BITS)) for layers in ((0, 3), (1,), (2,))]
    bits = np.tile(list(BITS.values()), (4, 1))
    error = np.array([WEIGHT[i] for i in (0, 1, 2, 0)])[:, None] / bits
    return Space(clusters, Sensitivity(tuple(BITS), error, bits, bits * 100), budget)


def loss(table: tuple[str, ...]) -> float:
    weights = (WEIGHT[0] / 2, WEIGHT[1], WEIGHT[2], WEIGHT[0] / 2)
    return float(sum(w / BITS[choice] for w, choice in zip(weights, table, strict=True)))


class Runs:
    """Counts what is run; interrupts itself after some."""

    def __init__(self, until: int = 10**6) -> None:
        self.tables: list[tuple[str, ...]] = []
        self._until = until

    def __call__(self, table: tuple[str, ...]) -> Outcome:
        if len(self.tables) == self._until:
            raise KeyboardInterrupt
        self.tables.append(table)
        return Outcome(loss(table), 1 / (1 + loss(table)))


def run(folder: Path, runs: Runs, trials: int, budget: float = 5.0) -> list[Tried]:
    return search(space(budget), folder, trials, 0, "kl", runs, lambda count: None)


def possible(budget: float) -> set[tuple[str, ...]]:
    tables = {(a, b, c, a) for a, b, c in product(BITS, repeat=3)}
    return {t for t in tables if sum(BITS[choice] for choice in t) / 4 <= budget}


def test_only_tables_within_the_budget_are_run_and_none_twice(tmp_path: Path) -> None:
    runs = Runs()
    tried = run(tmp_path, runs, 100)
    assert set(runs.tables) == possible(5.0)
    assert len(runs.tables) == len(set(runs.tables))
    best = min(tried, key=lambda one: one.outcome.kl)
    assert best.table == min(possible(5.0), key=loss)
    assert best.bits == sum(BITS[choice] for choice in best.table) / 4
    assert best.nbytes == 100 * 4 * best.bits


def test_starts_are_uniform_tables_and_what_the_errors_advise(tmp_path: Path) -> None:
    runs = Runs()
    run(tmp_path, runs, 3)
    assert runs.tables[:2] == [("four",) * 4, ("two",) * 4]  # "eight" is too large
    # The heaviest layer gets most.
    assert runs.tables[2][1] == "eight"


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    first, second = Runs(until=4), Runs()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, first, 9)
    known: list[int] = []
    tried = search(space(), tmp_path, 9, 0, "kl", second, known.append)
    assert known == [4]
    assert len(second.tables) == 5
    assert not set(first.tables) & set(second.tables)
    assert {one.table for one in tried} == {*first.tables, *second.tables}
    third = Runs()
    again = run(tmp_path, third, 9)
    assert not third.tables
    assert {one.table: one.outcome for one in again} == {one.table: one.outcome for one in tried}


def test_a_budget_below_the_smallest_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the smallest table stores 2\.000 bits"):
        run(tmp_path, Runs(), 5, budget=1.9)


def test_without_optuna_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install .kvbench\[tune\]"):
        run(tmp_path, Runs(), 5)
