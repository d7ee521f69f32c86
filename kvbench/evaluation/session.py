"""What one process needs to run any batch of a grid: models, methods and tasks, each made once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.calibration import (
    calibrated,
    calibration_file,
    statistics_for,
    statistics_of,
)
from kvbench.evaluation.hardware import load
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.runner import BatchRunner, PreparedMethod, Sink
from kvbench.evaluation.samples import Cell, ask, read_cell

if TYPE_CHECKING:
    from kvbench.cache import Calibration, KVQuantizer
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.load import LoadedModel
    from kvbench.models.vision import FeatureMemo


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

    def __init__(self, request: EvalRequest, sink: Sink, progress: Progress) -> None:
        """Nothing is loaded yet."""
        self.request, self._sink, self._progress = request, sink, progress
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
        statistics = calibration(loaded, self.request, self._progress)
        # The 16-bit cache answers first: the others are measured against its answer.
        methods = sorted(
            self._methods(loaded, statistics), key=lambda method: not method.is_reference
        )
        vision = self._contexts.enter_context(shared_vision(loaded.model))
        return _Ready(index, loaded, methods, vision)

    def _methods(
        self, loaded: LoadedModel, statistics: Calibration | None
    ) -> Iterator[PreparedMethod]:
        """Methods ready for the model; peers that can't run here are told of and left out."""
        for protocol in self.request.protocols:
            for choice in self.request.methods:
                try:
                    yield PreparedMethod.of(loaded, choice, protocol, statistics)
                except UserError as error:
                    if not _is_peer(choice):
                        raise
                    self._progress.note(f"{choice.spec} is left out under {protocol}: {error}")


def calibration(
    loaded: LoadedModel, request: EvalRequest, progress: Progress
) -> Calibration | None:
    """Statistics from the folder the user gave, else made once on data that no task scores.

    Raises:
        UserError: they belong to another revision of the model, or can't be read.
    """
    methods = calibrated(request.methods)
    if not methods:
        return None
    from kvbench.cache import load_calibration

    path = calibration_file(request.calibration or request.out / "calibration", loaded)
    if request.calibration is None:
        _complete(path, loaded, request, methods, progress)
    statistics = load_calibration(path, statistics_for(methods))
    made_for = statistics.manifest.get("revision")
    if made_for != loaded.revision:
        raise UserError(
            f"the calibration {path} was made for revision {made_for} of {loaded.entry.name}, not "
            f"{loaded.revision}; calibrate again or use another folder."
        )
    return statistics


def _complete(
    path: Path,
    loaded: LoadedModel,
    request: EvalRequest,
    methods: Mapping[str, KVQuantizer],
    progress: Progress,
) -> None:
    """Gather what a run's own file of statistics lacks, on the samples it was made with.

    It lies beside the rows: a run that goes on must store the same codes.
    """
    from kvbench.cache import Calibration, load_calibration, save_calibration

    kept = load_calibration(path) if path.exists() else Calibration({})
    missing = [name for name in statistics_for(methods) if name not in kept.statistics]
    if not missing:
        return
    samples = int(kept.manifest.get("prompts", request.calibration_samples))
    seed = int(kept.manifest.get("seed", request.seed))
    progress.note(
        f"calibrating {loaded.entry.name} for {', '.join(methods)} on {samples} samples of "
        "minimile's calibration split, which no task scores"
    )
    made = statistics_of(loaded, missing, samples, seed)
    manifest = kept.manifest or made.manifest
    save_calibration(Calibration({**kept.statistics, **made.statistics}, manifest), path)


def _is_peer(choice: MethodChoice) -> bool:
    from kvbench.cache import ForeignCache

    return isinstance(choice.quantizer, ForeignCache)
