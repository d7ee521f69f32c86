"""Optuna's NSGA-II over the clusters' choices; every table that was run is kept at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.tuning.clusters import Cluster
from kvbench.tuning.objective import Outcome
from kvbench.tuning.sensitivity import Sensitivity

STUDY = "study.db"
_PATIENCE = 50
"""Proposals for each table to be run: most are too large or known where few are possible."""


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
        folder: Where the study lies; it is continued.
        trials: Different tables to run, all together.
        seed: Of the sampler.
        objective: "kl" or "accuracy".
        run: Measures a table; whatever it raises leaves the study as it was.
        known: Told how many tables an earlier run has left.

    Raises:
        UserError: Optuna is missing, or even the smallest choices don't fit the budget.
    """
    smallest = space.table({str(i): c.choices[-1] for i, c in enumerate(space.clusters)})
    least = space.sensitivity.cost(smallest)[0]
    if least > space.budget:
        raise UserError(
            f"the smallest table stores {least:.3f} bits an element, more than the budget of "
            f"{space.budget:.3f}: give a larger budget or another method"
        )
    study = _study(folder, space, trials, seed)
    tried = {one.table: one for one in _tried(study)}
    known(len(tried))
    import optuna

    distributions: dict[str, Any] = {
        str(index): optuna.distributions.CategoricalDistribution(cluster.choices)
        for index, cluster in enumerate(space.clusters)
    }
    proposals = 0
    while len(tried) < trials and proposals < _PATIENCE * trials:
        proposals += 1
        trial = study.ask(distributions)
        table = space.table(trial.params)
        bits, nbytes = space.sensitivity.cost(table)
        trial.set_user_attr("bits", bits)
        loss = math.inf  # too large: never run, and behind all that fit
        if bits <= space.budget:
            one = tried.get(table) or Tried(table, bits, nbytes, run(table))
            tried[table] = one
            loss = one.outcome.kl if objective == "kl" else 1 - one.outcome.accuracy
            trial.set_user_attr("tried", _plain(one))
        study.tell(trial, (loss, bits))
    return list(tried.values())


def _study(folder: Path, space: Space, trials: int, seed: int) -> Any:
    """The folder's study, made or continued; trials that a killed run left open are closed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError('kvbench tune needs Optuna: run `pip install "kvbench[tune]"`') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}")
    study = optuna.create_study(
        storage=storage,
        study_name="tune",
        directions=["minimize", "minimize"],
        load_if_exists=True,
    )
    states = optuna.trial.TrialState
    done = len(study.trials)
    study.sampler = optuna.samplers.NSGAIISampler(
        # Another seed than before: a continued search shall not propose the same again.
        population_size=min(max(trials // 4, 8), 50),
        seed=seed + done,
        constraints_func=lambda trial: (trial.user_attrs["bits"] - space.budget,),
    )
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    if not done:
        for start in space.starts():
            study.enqueue_trial(start)
    return study


def _plain(one: Tried) -> dict[str, Any]:
    return {
        "table": list(one.table),
        "bits": one.bits,
        "nbytes": one.nbytes,
        "kl": one.outcome.kl,
        "accuracy": one.outcome.accuracy,
    }


def _tried(study: Any) -> Iterator[Tried]:
    for trial in study.get_trials(deepcopy=False):
        found = trial.user_attrs.get("tried")
        if found is not None and trial.state.is_finished() and trial.values:
            outcome = Outcome(found["kl"], found["accuracy"])
            yield Tried(tuple(found["table"]), found["bits"], found["nbytes"], outcome)
