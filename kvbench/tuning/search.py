"""Optuna's NSGA-II over the clusters' choices; every proposal is written down at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.evaluation.lines import Lines
from kvbench.tuning.clusters import Cluster
from kvbench.tuning.objective import Outcome
from kvbench.tuning.proposals import PROPOSALS, SCHEMA, Proposal
from kvbench.tuning.sensitivity import Sensitivity

_PATIENCE = 1000
"""Proposals in a row that are too large or known, after which the search ends."""
_COUNTABLE = 5000
"""Combinations up to which those within the budget are counted."""


@dataclass(frozen=True)
class Tried:
    """A table that the model was run with."""

    table: tuple[str, ...]
    bits: float
    nbytes: float
    outcome: Outcome


@dataclass(frozen=True)
class Space:
    """What may be tried: a choice for each cluster, within a budget in bits."""

    clusters: Sequence[Cluster]
    sensitivity: Sensitivity
    budget: float

    def table(self, chosen: Mapping[str, str]) -> tuple[str, ...]:
        """Choices of clusters as choices of layers."""
        of_layer = {
            layer: chosen[str(index)]
            for index, cluster in enumerate(self.clusters)
            for layer in cluster.layers
        }
        return tuple(of_layer[layer] for layer in range(len(of_layer)))

    def possible(self) -> float:
        """Number of tables within the budget, or infinity where they are too many to count."""
        if math.prod(len(cluster.choices) for cluster in self.clusters) > _COUNTABLE:
            return math.inf
        names = [str(index) for index in range(len(self.clusters))]
        combinations = product(*(cluster.choices for cluster in self.clusters))
        tables = (self.table(dict(zip(names, each, strict=True))) for each in combinations)
        return sum(self.sensitivity.cost(table)[0] <= self.budget for table in tables)

    def starts(self) -> Iterator[dict[str, str]]:
        """Choices to begin with: one for all layers, and what the sensitivities alone advise."""
        for choice in self.sensitivity.choices:
            if all(choice in cluster.choices for cluster in self.clusters):
                yield {str(index): choice for index in range(len(self.clusters))}
        yield self._advised()

    def _advised(self) -> dict[str, str]:
        """From the smallest choices upward, each time what lowers errors most for its bits."""
        chosen = {str(i): cluster.choices[-1] for i, cluster in enumerate(self.clusters)}
        while True:
            here = self._sum(chosen)
            steps = []
            for index, cluster in enumerate(self.clusters):
                for choice in cluster.choices:
                    bits, error = self._sum({**chosen, str(index): choice})
                    if here[0] < bits <= self.budget and error < here[1]:
                        steps.append(((here[1] - error) / (bits - here[0]), str(index), choice))
            if not steps:
                return chosen
            _, index_name, best = max(steps)
            chosen[index_name] = best

    def _sum(self, chosen: Mapping[str, str]) -> tuple[float, float]:
        """Mean bits, and the sum of squared errors over layers."""
        table, found = self.table(chosen), self.sensitivity
        columns = [found.choices.index(choice) for choice in table]
        errors = [found.error[layer, column] for layer, column in enumerate(columns)]
        return found.cost(table)[0], float(sum(error**2 for error in errors))


def search(
    space: Space,
    folder: Path,
    trials: int,
    seed: int,
    objective: str,
    run: Callable[[tuple[str, ...]], Outcome],
    known: Callable[[int], None],
) -> list[Tried]:
    """Run the model with up to `trials` tables within the budget; those of earlier runs count.

    Args:
        space: What may be tried.
        folder: Where the proposals lie; they are continued.
        trials: Different tables to run, all together.
        seed: Of the sampler.
        objective: "kl" or "accuracy".
        run: Measures a table; whatever it raises leaves the proposals before it.
        known: Told how many tables an earlier run has left.

    Raises:
        UserError: Optuna is missing, even the smallest choices don't fit the budget, or the folder
            can't be used.
    """
    smallest = space.table({str(i): c.choices[-1] for i, c in enumerate(space.clusters)})
    least = space.sensitivity.cost(smallest)[0]
    if least > space.budget:
        raise UserError(
            f"the smallest table stores {least:.3f} bits an element, more than the budget of "
            f"{space.budget:.3f}: give a larger budget or another method"
        )
    with Lines(folder, PROPOSALS) as lines:
        study = _Study(space, lines.rows(), trials, seed, objective)
        tried = {one.table: one for row in lines.rows() if (one := _tried(row)) is not None}
        known(len(tried))
        enough, stale = min(trials, space.possible()), 0
        while len(tried) < enough and stale < _PATIENCE:
            stale += 1
            trial = study.ask()
            table = space.table(trial.params)
            bits, nbytes = space.sensitivity.cost(table)
            one = tried.get(table)
            if one is None and bits <= space.budget:
                one = tried[table] = Tried(table, bits, nbytes, run(table))
                stale = 0
            lines.append(study.tell(trial, table, (bits, nbytes), one))
    return list(tried.values())


class _Study:
    """Optuna's study in memory, made again from what an earlier run has proposed."""

    def __init__(
        self, space: Space, before: Sequence[Proposal], trials: int, seed: int, objective: str
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                'kvbench tune needs Optuna: run `pip install "kvbench[tune]"`'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._budget, self._objective = space.budget, objective
        self._distributions: dict[str, Any] = {
            str(index): optuna.distributions.CategoricalDistribution(cluster.choices)
            for index, cluster in enumerate(space.clusters)
        }
        sampler = optuna.samplers.NSGAIISampler(
            # Another seed than before: a continued search shall not propose the same again.
            population_size=min(max(trials // 4, 8), 50),
            seed=seed + len(before),
        )
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for row in before:
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=dict(row.chosen),
                    distributions=self._distributions,
                    values=[self._loss(row.outcome), row.bits],
                    system_attrs=row.sampler,
                )
            )
        for start in list(space.starts())[len(before) :]:
            self._study.enqueue_trial(start)

    def ask(self) -> Any:
        """The next trial."""
        return self._study.ask(self._distributions)

    def tell(
        self, trial: Any, table: tuple[str, ...], cost: tuple[float, float], one: Tried | None
    ) -> Proposal:
        """End a trial; returns what to write down."""
        outcome = None if one is None else one.outcome
        trial.set_constraint("budget", cost[0] - self._budget)
        told = self._study.tell(trial, (self._loss(outcome), cost[0]))
        return Proposal(
            SCHEMA,
            told.number,
            told.params,
            list(table),
            *cost,
            None if outcome is None else outcome.kl,
            None if outcome is None else outcome.accuracy,
            # Which start it was is of no use later.
            {key: value for key, value in told.system_attrs.items() if key != "fixed_params"},
        )

    def _loss(self, outcome: Outcome | None) -> float:
        if outcome is None:
            return math.inf  # too large: never run, and behind all that fit
        return outcome.kl if self._objective == "kl" else 1 - outcome.accuracy


def _tried(row: Proposal) -> Tried | None:
    outcome = row.outcome
    return None if outcome is None else Tried(tuple(row.table), row.bits, row.nbytes, outcome)
