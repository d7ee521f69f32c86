"""Calibration of one model on data that no task scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.choices import suite
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.registry import TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.cache import Calibration, KVQuantizer
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.request import CalibrationRequest
    from kvbench.evaluation.text import Text
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry


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
        path = calibration_file(request.out, entry)
        names = statistics_for(needed)
        save_calibration(
            statistics_of(loaded, names, request.samples, request.seed, request.data_root), path
        )
        yield path


def kept_statistics(path: Path, loaded: LoadedModel, names: Collection[str]) -> Calibration:
    """Read a file of statistics that were made for this model.

    Raises:
        UserError: they belong to another revision of the model, lack a name, or can't be read.
    """
    from kvbench.cache import load_calibration

    return checked_statistics(load_calibration(path, names), path, loaded)


def checked_statistics(statistics: Calibration, path: Path, loaded: LoadedModel) -> Calibration:
    """The same, if they were made for this model.

    Raises:
        UserError: they belong to another revision of the model.
    """
    made_for = statistics.manifest.get("revision")
    if made_for != loaded.revision:
        raise UserError(
            f"the calibration {path} was made for revision {made_for} of {loaded.entry.name}, not "
            f"{loaded.revision}; calibrate again or use another folder."
        )
    return statistics


def lacking(path: Path, names: Collection[str]) -> list[str]:
    """Those of the names that a run's own file of statistics does not have yet."""
    from kvbench.cache import load_calibration

    have = load_calibration(path).statistics if path.exists() else {}
    return [name for name in names if name not in have]


def drawn(path: Path, samples: int, seed: int) -> tuple[int, int]:
    """Samples and seed that a run's own file was made with, else those given.

    What is added to a file comes from the same prompts as what it has.
    """
    from kvbench.cache import load_calibration

    made = load_calibration(path).manifest if path.exists() else {}
    return int(made.get("prompts", samples)), int(made.get("seed", seed))


def keep_statistics(made: Calibration, path: Path) -> None:
    """Write statistics beside a run's rows; what the file has already stays as it is.

    A run that goes on must store the same codes.
    """
    from kvbench.cache import Calibration, load_calibration, save_calibration

    kept = load_calibration(path) if path.exists() else Calibration({})
    together = {**made.statistics, **kept.statistics}
    save_calibration(Calibration(together, kept.manifest or made.manifest), path)


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


def calibration_file(folder: Path, entry: ModelEntry) -> Path:
    """Where a model's statistics lie in a calibration folder."""
    return folder / f"{entry.name}.safetensors"


def statistics_of_text(
    loaded: LoadedModel, names: Collection[str], text: Text, windows: Tensor
) -> Calibration:
    """Run a model over windows (M, T) from the end of a text, which are never scored."""
    from kvbench.cache import calibrate_statistics

    manifest = {
        "model": loaded.entry.name,
        "revision": loaded.revision,
        "data": f"last {len(windows)} windows of {windows.shape[1]} tokens of {text.name}",
        "sha256": text.sha256,
    }
    prompts = [{"input_ids": ids[None].to(loaded.model.device)} for ids in windows]
    return calibrate_statistics(loaded.model, prompts, manifest, names)


def statistics_of(
    loaded: LoadedModel,
    statistics: Collection[str],
    samples: int,
    seed: int,
    root: Path | None = None,
) -> Calibration:
    """Run a model over calibration prompts, drawn evenly from the twelve tasks' folders.

    Without a root the data are the tasks' own calibration split, made on first use.

    Raises:
        UserError: the data can't be read or made.
    """
    from kvbench.cache import calibrate_statistics

    names = suite()
    folder = root or TASKS.get(names[0]).calibration_root(samples)
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
