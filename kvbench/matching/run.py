"""Settings of every method for every budget, and their evaluation side by side."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.hardware import check_available
from kvbench.evaluation.progress import Progress
from kvbench.matching.choose import Absent, Sized, nearest, within_reach
from kvbench.matching.knobs import Candidate, candidates
from kvbench.matching.measure import Prompt, depends_on_states, stored_bits
from kvbench.matching.request import MatchRequest

if TYPE_CHECKING:
    from kvbench.cache import BoundMethod, Calibration
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

MATCHED = "matched.json"


@dataclass(frozen=True)
class Matched:
    """One model's settings for one budget; `conditions` as in `Ground`."""

    model: str
    budget: float
    found: tuple[Sized, ...]
    absent: tuple[Absent, ...]
    conditions: Mapping[str, str | int]


@dataclass(frozen=True)
class _Ready:
    """A setting made ready for a model."""

    candidate: Candidate
    bound: BoundMethod


def match(request: MatchRequest, progress: Progress) -> list[Matched]:
    """Find settings for all models and budgets, and write them to ``matched.json``.

    Raises:
        UserError: data, a model or the output folder can't be used.
    """
    evaluation = request.evaluation
    for entry in evaluation.models:
        check_available(entry)
    evaluation.out.mkdir(parents=True, exist_ok=True)
    found = [one for entry in evaluation.models for one in _match(entry, request, progress)]
    document = {
        "command": shlex.join(["kvbench", *sys.argv[1:]]),
        "version": kvbench.__version__,
        "rows": evaluation.rows,
        "matches": [_plain(one) for one in found],
    }
    write_atomically(evaluation.out / MATCHED, json.dumps(document, indent=2) + "\n")
    return found


def compare(request: MatchRequest, matched: Sequence[Matched], progress: Progress) -> None:
    """Evaluate the settings of each model beside the 16-bit cache.

    Raises:
        UserError: no method has any of the sizes, or as the evaluation's `run`.
    """
    from kvbench.defaults import REFERENCE
    from kvbench.evaluation.choices import choose_methods

    if not any(one.found for one in matched):
        raise UserError("no method has a setting of these sizes: give other --bits or methods")
    for entry in request.evaluation.models:
        chosen = {choice.spec: choice for choice in choose_methods(REFERENCE)}
        for one in matched:
            if one.model == entry.name:
                chosen |= {s.candidate.choice.spec: s.candidate.choice for s in one.found}
        request.evaluation.run(entry, tuple(chosen.values()), progress)


def _match(entry: ModelEntry, request: MatchRequest, progress: Progress) -> Iterator[Matched]:
    evaluation = request.evaluation
    ground = evaluation.ground(entry, progress)
    ready, refused = _ready(ground.loaded, evaluation.methods, ground.statistics)
    progress.note(f"{entry.name}: {len(ready)} settings on {len(ground.prompts)} prompts")
    sized = _measured(ground.loaded, ready, ground.prompts, request.budgets, progress)
    for budget in request.budgets:
        verdicts = [
            refused.get(choice.spec)
            or nearest(choice.spec, [s for s in sized if s.candidate.name == choice.spec], budget)
            for choice in evaluation.methods
        ]
        found, absent = _distinct(verdicts)
        yield Matched(entry.name, budget, found, absent, ground.conditions)


def _distinct(
    verdicts: Sequence[Sized | Absent],
) -> tuple[tuple[Sized, ...], tuple[Absent, ...]]:
    """Two names may end up as one method: the one that had to change less is kept."""
    found: list[Sized] = []
    absent = [verdict for verdict in verdicts if isinstance(verdict, Absent)]
    sized = [verdict for verdict in verdicts if isinstance(verdict, Sized)]
    for one in sorted(sized, key=lambda one: one.candidate.changes):
        method = one.candidate.choice.quantizer
        twin = next((s for s in found if s.candidate.choice.quantizer == method), None)
        if twin is None:
            found.append(one)
        else:
            spec = twin.candidate.choice.spec
            absent.append(Absent(one.candidate.name, f"is the same as {spec}"))
    found.sort(key=sized.index)
    return tuple(found), tuple(absent)


def _ready(
    loaded: LoadedModel, methods: Sequence[MethodChoice], statistics: Calibration | None
) -> tuple[list[_Ready], dict[str, Absent]]:
    """All settings that can store the model's layers; methods that can't be measured."""
    from kvbench.cache import ForeignCache, bind

    ready, refused = [], {}
    for choice in methods:
        if isinstance(choice.quantizer, ForeignCache):
            refused[choice.spec] = Absent(choice.spec, "brings a cache of its own")
            continue
        for candidate in candidates(choice):
            try:
                bound = bind(
                    loaded.model,
                    candidate.choice.quantizer,  # type: ignore[arg-type]
                    calibration=statistics,
                    text_salient_layers=loaded.entry.tsa_layers,
                )
            except UserError:
                continue  # such groups don't fit the model's heads
            ready.append(_Ready(candidate, bound))
    return ready, refused


def _measured(
    loaded: LoadedModel,
    ready: Sequence[_Ready],
    prompts: Sequence[Prompt],
    budgets: Sequence[float],
    progress: Progress,
) -> list[Sized]:
    """Every setting's bits; those that depend on states exactly where a budget is near."""
    progress.begin(2 * len(prompts), 0)
    if not ready:
        return []
    estimates = stored_bits(
        loaded.model, prompts, [r.bound for r in ready], shared=True, advance=progress.advance
    )
    sized: list[Sized] = []
    depending: list[Sized] = []
    for one, bits in zip(ready, estimates, strict=True):
        kind = depending if depends_on_states(one.bound.method.needs) else sized
        kind.append(Sized(one.candidate, bits))
    names = dict.fromkeys(one.candidate.name for one in depending)
    near = [
        one
        for name in names
        for one in within_reach([d for d in depending if d.candidate.name == name], budgets)
    ]
    if near:
        bounds = {id(one.candidate): one.bound for one in ready}
        methods = [bounds[id(one.candidate)] for one in near]
        exact = stored_bits(loaded.model, prompts, methods, advance=progress.advance)
        sized += [Sized(one.candidate, bits) for one, bits in zip(near, exact, strict=True)]
    return sized


def _plain(one: Matched) -> dict[str, Any]:
    points = [
        {"name": s.candidate.name, "method": s.candidate.choice.spec, "bits": s.bits}
        for s in one.found
    ]
    absent = {each.name: each.reason for each in one.absent}
    found = {"model": one.model, "budget": one.budget, "points": points, "absent": absent}
    return {**found, "conditions": dict(one.conditions)}
