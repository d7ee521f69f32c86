"""A model's sensitivities, clusters, search and preset, written so that a search can go on."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.defaults import TUNED
from kvbench.errors import UserError
from kvbench.evaluation.environment import environment
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.hardware import check_available, load
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.samples import Question, ask, encoded, read_cell
from kvbench.registry import METHODS, TASKS
from kvbench.specs import canonical_spec, parse_spec
from kvbench.tuning.clusters import Cluster, cluster, pareto, worth_trying
from kvbench.tuning.objective import Judge, Outcome
from kvbench.tuning.request import TuneRequest
from kvbench.tuning.search import Space, Tried, search
from kvbench.tuning.sensitivity import Sensitivity, measure

if TYPE_CHECKING:
    from kvbench.cache import LayerwiseQuantizer
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

SUMMARY, PRESET = "tune.json", "preset.json"


@dataclass(frozen=True)
class _Work:
    """One model's search."""

    request: TuneRequest
    loaded: LoadedModel
    method: LayerwiseQuantizer
    folder: Path


def tune(request: TuneRequest, progress: Progress) -> Iterator[Path]:
    """Search a table for every model; yields the models' folders.

    Raises:
        UserError: data, a model or the method can't be used, the folder holds another search, or
            the budget is too small.
    """
    from kvbench.cache import LayerwiseQuantizer

    method = request.method.quantizer
    if not isinstance(method, LayerwiseQuantizer):
        raise UserError(
            f"{request.method.spec} has no choices for single layers: tune a method that has, "
            f"such as {TUNED}"
        )
    for entry in request.models:
        check_available(entry)
    for entry in request.models:
        folder = request.out / entry.name
        folder.mkdir(parents=True, exist_ok=True)
        _tune(entry, request, method, folder, progress)
        yield folder


def _tune(
    entry: ModelEntry,
    request: TuneRequest,
    method: LayerwiseQuantizer,
    folder: Path,
    progress: Progress,
) -> None:
    loaded = load(entry, request.device, request.dtype)
    work = _Work(request, loaded, method, folder)
    questions, dataset = _questions(loaded, request)
    identity = _identity(work, dataset)
    _check_folder(folder, identity)
    inputs = [encoded(loaded, [question]) for question in questions]
    progress.begin(len(inputs) + request.trials, 0)
    progress.cell(f"{entry.name}: sensitivity")
    found = measure(loaded.model, inputs, _uniform(work), progress.advance)
    budget = request.budget(found.nbytes_a_bit)
    clusters = cluster(found, request.clusters)
    summary = {
        "identity": identity,
        "budget": budget,
        "clusters": [dataclasses.asdict(one) for one in clusters],
        "label": loaded.entry.label,
        "prompts": len(inputs),
        "command": shlex.join(["kvbench", *sys.argv[1:]]),
        "version": kvbench.__version__,
        "environment": environment(),
    }
    write_atomically(folder / "sensitivity.csv", _sensitivity_csv(found, clusters))
    _write_json(folder / SUMMARY, summary)
    tried, reference = _search(work, questions, inputs, Space(clusters, found, budget), progress)
    _write_json(folder / SUMMARY, {**summary, "accuracy_fp16": reference.accuracy})
    _write_trials(work, tried, summary)


def _search(
    work: _Work,
    questions: Sequence[Question],
    inputs: Sequence[Any],
    space: Space,
    progress: Progress,
) -> tuple[list[Tried], Outcome]:
    request = work.request
    progress.cell(f"{work.loaded.entry.name}: search")
    judge = Judge(work.loaded, questions, inputs, request.protocol, request.max_new_tokens)

    def run(table: tuple[str, ...]) -> Outcome:
        outcome = judge.outcome(work.method.with_layers(table))
        progress.advance()
        return outcome

    def known(count: int) -> None:
        if count:
            progress.note(f"{count} of {request.trials} tables are there already")
        for _ in range(min(count, request.trials)):
            progress.advance()

    tried = search(space, work.folder, request.trials, request.seed, request.objective, run, known)
    return tried, judge.reference


def _uniform(work: _Work) -> dict[str, Any]:
    """The method with each choice in all layers."""
    from kvbench.cache import bind
    from kvbench.cache.specs import layer_specs

    model, salient = work.loaded.model, work.loaded.entry.tsa_layers
    layers = len(layer_specs(model.config))
    return {
        choice: bind(model, work.method.with_layers([choice] * layers), text_salient_layers=salient)
        for choice in work.method.layer_choices
    }


def _questions(loaded: LoadedModel, request: TuneRequest) -> tuple[list[Question], str]:
    """Prompts drawn evenly from the tasks, and the data's name."""
    share = -(-request.samples // len(request.tasks))
    root = request.data_root or TASKS.get(request.tasks[0]).calibration_root(share)
    found: list[Question] = []
    dataset = ""
    for name in request.tasks:
        cell = read_cell(name, root, share, request.seed)
        left = request.samples - len(found)
        found += [ask(loaded, cell.task, sample) for sample in cell.samples[:left]]
        dataset = cell.dataset
    return found, dataset


def _identity(work: _Work, dataset: str) -> dict[str, Any]:
    """Everything that two runs of one search must share."""
    request, loaded = work.request, work.loaded
    return {
        "model": loaded.entry.name,
        "revision": loaded.revision,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "method": request.method.spec,
        "protocol": request.protocol,
        "objective": request.objective,
        "bits": request.bits,
        "nbytes": request.nbytes,
        "dataset": dataset,
        "tasks": list(request.tasks),
        "samples": request.samples,
        "clusters": request.clusters,
        "seed": request.seed,
        "max_new_tokens": request.max_new_tokens,
        "text_salient_layers": list(loaded.entry.tsa_layers),
    }


def _check_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Refuse to mix two searches.

    Raises:
        UserError: the folder holds another one.
    """
    path = folder / SUMMARY
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        other = [name for name, value in identity.items() if before.get(name) != value]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"can't read {path} ({error}): choose another --out") from error
    if other:
        raise UserError(
            f"{folder} holds a search with another {other[0]} ({before.get(other[0])}): "
            "choose another --out"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _sensitivity_csv(found: Sensitivity, clusters: Sequence[Cluster]) -> str:
    of_layer = {layer: i for i, one in enumerate(clusters) for layer in one.layers}
    sets = worth_trying(found)
    lines = [
        [
            layer,
            of_layer[layer],
            choice,
            f"{found.error[layer, column]:.6g}",
            f"{found.bits[layer, column]:.6g}",
            str(choice in sets[layer]).lower(),
        ]
        for layer in range(len(found.error))
        for column, choice in enumerate(found.choices)
    ]
    return _csv(["layer", "cluster", "choice", "error", "bits", "worth_trying"], lines)


def _write_trials(work: _Work, tried: Sequence[Tried], summary: dict[str, Any]) -> None:
    """All tables that were run, the front among them, and the best as a preset."""
    by_kl = work.request.objective == "kl"
    losses = [t.outcome.kl if by_kl else 1 - t.outcome.accuracy for t in tried]
    front = pareto([t.bits for t in tried], losses)
    name = parse_spec(work.request.method.spec)[0]
    lines = [
        [
            _spec(work, one, name),
            f"{one.bits:.6g}",
            round(one.nbytes),
            f"{one.outcome.kl:.6g}",
            f"{one.outcome.accuracy:.6g}",
            str(place in front).lower(),
        ]
        for place, one in enumerate(tried)
    ]
    columns = ["method", "bits", "cache_bytes", "kl_mean", "accuracy", "front"]
    write_atomically(work.folder / "trials.csv", _csv(columns, lines))
    best = tried[front[-1]]  # the largest of the front is the best within the budget
    method: Any = work.method.with_layers(best.table)
    _write_json(
        work.folder / PRESET,
        {
            "method": name,
            "parameters": {f.name: getattr(method, f.name) for f in dataclasses.fields(method)},
            "bits": best.bits,
            "cache_bytes": round(best.nbytes),
            "kl_mean": best.outcome.kl,
            "accuracy": best.outcome.accuracy,
            **{key: summary[key] for key in ("identity", "budget", "command", "version")},
        },
    )


def _spec(work: _Work, one: Tried, name: str) -> str:
    return canonical_spec(name, METHODS.get(name), work.method.with_layers(one.table))


def _csv(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return buffer.getvalue()
