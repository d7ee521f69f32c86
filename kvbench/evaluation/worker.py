"""What one process of a crew does: it runs tasks of a request and hands back what came of them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job, Session

if TYPE_CHECKING:
    from kvbench.cache import Calibration


@dataclass(frozen=True)
class Calibrate:
    """Gather the statistics of one model of the request, on so many samples."""

    model: int
    samples: int
    seed: int


Task = Job | Calibrate


@dataclass(frozen=True)
class Setup:
    """All that a worker must be told before its first task.

    Attributes:
        request: The whole grid.
        known: Keys of rows that need no run.
        statistics: By model's name, the file that `save_calibration` writes: workers need not share
            a file system, and tensors would tie the processes' memory together.
        threads: Of torch's on the CPU; None leaves torch's own choice.
    """

    request: EvalRequest
    known: frozenset[str] = frozenset()
    statistics: Mapping[str, bytes] = field(default_factory=dict)
    threads: int | None = None


@dataclass
class Outcome:
    """What came of a task: its rows, what was said on the way, and what went wrong, if anything."""

    rows: list[SampleRow] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    advances: int = 0
    fault: str | None = None
    statistics: tuple[int, bytes] = (0, b"")
    """Of `Calibrate`: the model and its file's content."""


class Worker(Silent):
    """A session with its sink and listener: both fill the outcome of the task under way."""

    def __init__(self, setup: Setup) -> None:
        """Nothing is loaded yet but the statistics.

        Raises:
            UserError: statistics that can't be read.
        """
        import torch

        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._known, self._outcome = setup.known, Outcome()
        statistics = {name: from_bytes(content) for name, content in setup.statistics.items()}
        self._session = Session(setup.request, self, self, statistics)

    def get_version(self) -> str:
        """This process's kvbench: rows of another version are other rows."""
        return kvbench.__version__

    def run(self, task: Task) -> Outcome:
        """Run a task; a `UserError` becomes its fault, so that rows before it are not lost."""
        self._outcome = Outcome()
        try:
            if isinstance(task, Calibrate):
                statistics = self._session.calibrate(task.model, task.samples, task.seed)
                self._outcome.statistics = task.model, to_bytes(statistics)
            else:
                self._session.run(task)
        except UserError as error:
            self._outcome.fault = str(error)
        return self._outcome

    def has(self, key: str) -> bool:
        """Whether a row needs no run."""
        return key in self._known or any(row.key == key for row in self._outcome.rows)

    def append(self, row: SampleRow) -> bool:
        """Keep a row for the outcome."""
        self._outcome.rows.append(row)
        return True

    def cell(self, label: str) -> None:
        """Keep a cell's name for the outcome."""
        self._outcome.cells.append(label)

    def note(self, text: str) -> None:
        """Keep a note for the outcome."""
        self._outcome.notes.append(text)

    def advance(self) -> None:
        """Count one more sample for the outcome."""
        self._outcome.advances += 1


def to_bytes(calibration: Calibration) -> bytes:
    """What `save_calibration` writes."""
    from kvbench.cache import save_calibration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        save_calibration(calibration, path)
        return path.read_bytes()


def from_bytes(content: bytes) -> Calibration:
    """The statistics that `to_bytes` wrote."""
    from kvbench.cache import load_calibration

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        path.write_bytes(content)
        return load_calibration(path)
