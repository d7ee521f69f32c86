"""Calibration of one model on data that no task scores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.registry import TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.cache import Calibration
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.request import CalibrationRequest
    from kvbench.evaluation.text import Text
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

SPLIT_SEED = 9000
"""minimile's calibration split: the generator's set of this seed, which no task scores."""


def calibrate(request: CalibrationRequest, progress: Progress) -> Iterator[Path]:
    """Calibrate every model and write one file each; yields the paths.

    Raises:
        UserError: data, a model or the output folder can't be used.
    """
    from kvbench.cache import save_calibration
    from kvbench.evaluation.hardware import load

    for entry in request.models:
        loaded = load(entry, request.device, request.dtype)
        progress.note(f"calibrating {entry.name} on {request.samples} samples")
        path = calibration_file(request.out, entry)
        save_calibration(
            statistics_of(loaded, request.samples, request.seed, request.data_root), path
        )
        yield path


def kept_statistics(path: Path, loaded: LoadedModel) -> Calibration:
    """Read a file of statistics that were made for this model.

    Raises:
        UserError: they belong to another revision of the model, or can't be read.
    """
    from kvbench.cache import load_calibration

    return checked_statistics(load_calibration(path), path, loaded)


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


def calibration_file(folder: Path, entry: ModelEntry) -> Path:
    """Where a model's statistics lie in a calibration folder."""
    return folder / f"{entry.name}.safetensors"


def statistics_of_text(loaded: LoadedModel, text: Text, windows: Tensor) -> Calibration:
    """Run a model over windows (M, T) from the end of a text, which are never scored."""
    from kvbench.cache import calibrate_statistics

    manifest = {
        "model": loaded.entry.name,
        "revision": loaded.revision,
        "data": f"last {len(windows)} windows of {windows.shape[1]} tokens of {text.name}",
        "sha256": text.sha256,
    }
    prompts = ({"input_ids": ids[None].to(loaded.model.device)} for ids in windows)
    return calibrate_statistics(loaded.model, prompts, manifest)


def statistics_of(
    loaded: LoadedModel, samples: int, seed: int, root: Path | None = None
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
    return calibrate_statistics(
        loaded.model, _prompts(loaded, names, folder, share, seed, samples), manifest
    )


def _prompts(
    loaded: LoadedModel, names: list[str], root: Path, share: int, seed: int, total: int
) -> Iterator[dict[str, Any]]:
    for name in names:
        cell = read_cell(name, root, share, seed)
        for sample in cell.samples[: max(total, 0)]:
            yield dict(encoded(loaded, [ask(loaded, cell.task, sample)]).kwargs())
        total -= len(cell.samples)
