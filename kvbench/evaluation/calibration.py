"""Calibration of one model on data that no task scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.registry import TASKS

if TYPE_CHECKING:
    from kvbench.cache import Calibration, KVQuantizer
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.request import CalibrationRequest
    from kvbench.models.load import LoadedModel

SPLIT_SEED = 9000
"""minimile's calibration split: the generator's set of this seed, which no task scores."""


def calibrate(request: CalibrationRequest, progress: Progress) -> Iterator[Path]:
    """Gather what the methods need of every model and write one file each; yields the paths.

    Raises:
        UserError: no method needs statistics, or data, a model or the output folder can't be used.
    """
    from kvbench.cache import save_calibration
    from kvbench.evaluation.hardware import load

    needed = calibrated(request.methods)
    if not needed:
        raise UserError("none of these methods needs statistics: there is nothing to calibrate.")
    for entry in request.models:
        loaded = load(entry, request.device, request.dtype)
        progress.note(
            f"calibrating {entry.name} for {', '.join(needed)} on {request.samples} samples"
        )
        path = calibration_file(request.out, loaded)
        names = statistics_for(needed)
        save_calibration(
            statistics_of(loaded, names, request.samples, request.seed, request.data_root), path
        )
        yield path


def calibrated(methods: Iterable[MethodChoice]) -> dict[str, KVQuantizer]:
    """The methods that need statistics, by their specification."""
    from kvbench.cache import ForeignCache

    found = {choice.spec: choice.quantizer for choice in methods}
    return {
        spec: method
        for spec, method in found.items()
        if not isinstance(method, ForeignCache) and method.needs.statistics
    }


def statistics_for(methods: Mapping[str, KVQuantizer]) -> list[str]:
    """Names of the statistics that methods need, each once."""
    names = (name for method in methods.values() for name in method.needs.statistics)
    return list(dict.fromkeys(names))


def calibration_file(folder: Path, loaded: LoadedModel) -> Path:
    """Where a model's statistics lie in a calibration folder."""
    return folder / f"{loaded.entry.name}.safetensors"


def statistics_of(
    loaded: LoadedModel,
    statistics: Collection[str],
    samples: int,
    seed: int,
    root: Path | None = None,
) -> Calibration:
    """Run a model over calibration prompts, drawn evenly from the twelve tasks' folders.

    Without a root the data are minimile's calibration split, made on first use.

    Raises:
        UserError: the data can't be read or made.
    """
    from kvbench.cache import calibrate_statistics
    from kvbench.tasks import minimile

    names = [name for name in TASKS.names() if TASKS.get(name).suite == "milebench"]
    folder = root or minimile.cached_root(SPLIT_SEED, samples)
    share = -(-samples // len(names))
    manifest = {
        "model": loaded.entry.name,
        "revision": loaded.revision,
        "data": folder.name,
        "seed": str(seed),
    }
    prompts = _Prompts(loaded, names, folder, share, seed, samples)
    return calibrate_statistics(loaded.model, prompts, manifest, statistics)


@dataclass(frozen=True)
class _Prompts:
    """Encoded prompts, made anew each time they are gone through."""

    loaded: LoadedModel
    tasks: list[str]
    root: Path
    share: int
    seed: int
    total: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        left = self.total
        for name in self.tasks:
            cell = read_cell(name, self.root, self.share, self.seed)
            for sample in cell.samples[: max(left, 0)]:
                yield dict(encoded(self.loaded, [ask(self.loaded, cell.task, sample)]).kwargs())
            left -= len(cell.samples)
