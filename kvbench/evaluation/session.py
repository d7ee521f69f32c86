"""What one process needs to run any batch of a grid: models, methods and tasks, each made once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.calibration import (
    calibrated,
    calibration_file,
    checked_statistics,
    drawn,
    keep_statistics,
    kept_statistics,
    lacking,
    statistics_for,
    statistics_of,
)
from kvbench.evaluation.hardware import load
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.runner import BatchRunner, PreparedMethod, Sink
from kvbench.evaluation.samples import Cell, ask, read_cell

if TYPE_CHECKING:
    from kvbench.cache import Calibration
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.load import LoadedModel
    from kvbench.models.vision import FeatureMemo
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class Job:
    """Samples start to stop of a task, for one model of the request: the smallest unit of work."""

    model: int
    task: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Ready:
    """A loaded model, the methods made for it and what its vision tower said of this batch."""

    index: int
    loaded: LoadedModel
    methods: list[PreparedMethod]
    vision: FeatureMemo


class Session:
    """Runs jobs of one request in this process; loads a model when its first job comes.

    Example:
        with Session(request, store, progress) as session:
            for job in session.jobs():
                session.run(job)
    """

    def __init__(
        self,
        request: EvalRequest,
        sink: Sink,
        progress: Progress,
        statistics: Mapping[str, Calibration] | None = None,
    ) -> None:
        """Nothing is loaded yet; `statistics` by model's name stand in for the folder's."""
        self.request, self._sink, self._progress = request, sink, progress
        self._statistics = statistics or {}
        self._ready: _Ready | None = None
        self._contexts = ExitStack()
        self._cells: dict[str, Cell] = {}
        self._label = ""

    def __enter__(self) -> Session:
        """Load nothing yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let the model go."""
        self.close()

    def close(self) -> None:
        """Let the loaded model go; the next job loads its own."""
        self._ready = None
        self._contexts.close()

    def cell(self, task: str) -> Cell:
        """The chosen samples of a task.

        Raises:
            UserError: the data are missing or not as they should be.
        """
        if task not in self._cells:
            request = self.request
            self._cells[task] = read_cell(task, request.data_root, request.limit, request.seed)
        return self._cells[task]

    def jobs(self) -> list[Job]:
        """The whole grid in batches, model by model."""
        size = self.request.batch
        return [
            Job(model, task, start, min(start + size, len(self.cell(task).samples)))
            for model in range(len(self.request.models))
            for task in self.request.tasks
            for start in range(0, len(self.cell(task).samples), size)
        ]

    def run(self, job: Job) -> None:
        """Answer what the sink lacks of one batch.

        Raises:
            UserError: a model, a method or an image can't be used.
        """
        ready = self._model(job.model)
        cell = self.cell(job.task)
        self._announce(f"{ready.loaded.entry.name} · {cell.task.label}")
        runner = BatchRunner(
            ready.loaded,
            cell,
            ready.methods,
            self._sink,
            self._progress,
            self.request.batch,
            self.request.max_new_tokens,
        )
        samples = cell.samples[job.start : job.stop]
        runner.run([ask(ready.loaded, cell.task, sample) for sample in samples])
        ready.vision.forget()

    def calibrate(self, model: int, samples: int, seed: int) -> Calibration:
        """Gather the statistics of one model of the request; nothing is written.

        Raises:
            UserError: the model or the data can't be used.
        """
        self.close()
        request = self.request
        loaded = load(request.models[model], request.device, request.dtype)
        names = statistics_for(calibrated(request.methods))
        return statistics_of(loaded, names, samples, seed)

    def _announce(self, label: str) -> None:
        """Name the cell of the grid when it begins."""
        if label != self._label:
            self._label = label
            self._progress.cell(label)

    def _model(self, index: int) -> _Ready:
        if self._ready is None or self._ready.index != index:
            self.close()  # the next one needs the memory
            self._ready = self._load(index)
        return self._ready

    def _load(self, index: int) -> _Ready:
        from kvbench.models.vision import shared_vision

        loaded = load(self.request.models[index], self.request.device, self.request.dtype)
        given = self._statistics.get(loaded.entry.name)
        statistics = calibration(loaded, self.request, self._progress, given)
        request = self.request
        methods = prepared_methods(
            loaded, request.methods, request.protocols, statistics, self._progress
        )
        vision = self._contexts.enter_context(shared_vision(loaded.model))
        return _Ready(index, loaded, methods, vision)


def prepared_methods(
    loaded: LoadedModel,
    choices: Iterable[MethodChoice],
    protocols: Iterable[str],
    statistics: Calibration | None,
    progress: Progress,
) -> list[PreparedMethod]:
    """Methods ready for a model; peers that can't run here are told of and left out.

    The 16-bit cache comes first: the others are measured against its answer.

    Raises:
        UserError: a method can't store this model's layers.
    """
    ready = []
    for protocol, choice in itertools.product(protocols, choices):
        try:
            ready.append(PreparedMethod.of(loaded, choice, protocol, statistics))
        except UserError as error:
            if not _is_peer(choice):
                raise
            progress.note(f"{choice.spec} is left out under {protocol}: {error}")
    return sorted(ready, key=lambda method: not method.is_reference)


def calibration(
    loaded: LoadedModel,
    request: EvalRequest,
    progress: Progress,
    given: Calibration | None = None,
) -> Calibration | None:
    """Statistics from the folder the user gave, else made once on data that no task scores.

    `given` are those of `calibration_path`, read already.

    Raises:
        UserError: they belong to another revision of the model, or can't be read.
    """
    names = statistics_for(calibrated(request.methods))
    if not names:
        return None
    path = calibration_path(request, loaded.entry)
    if given is not None:
        return checked_statistics(given, path, loaded)
    if request.calibration is None and (missing := lacking(path, names)):
        samples, seed = drawn(path, request.calibration_samples, request.seed)
        progress.note(calibration_note(request, loaded.entry, samples))
        keep_statistics(statistics_of(loaded, missing, samples, seed), path)
    return kept_statistics(path, loaded, names)


def calibration_path(request: EvalRequest, entry: ModelEntry) -> Path:
    """Where a model's statistics lie: in the folder the user gave, else beside the rows."""
    return calibration_file(request.calibration or request.out / "calibration", entry)


def calibration_note(request: EvalRequest, entry: ModelEntry, samples: int) -> str:
    """What is said before statistics are gathered."""
    return (
        f"calibrating {entry.name} for {', '.join(calibrated(request.methods))} on "
        f"{samples} samples of a split which no task scores"
    )


def _is_peer(choice: MethodChoice) -> bool:
    from kvbench.cache import ForeignCache

    return isinstance(choice.quantizer, ForeignCache)
