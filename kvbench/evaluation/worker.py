"""What one process of a crew does: it runs tasks of a request and tells what comes of them at once.

A row is handed over as soon as it is made, so a worker that dies takes along what it was answering
and nothing else.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class Ready:
    """A worker's first message: it waits for a task. Rows of another version are other rows."""

    version: str


@dataclass(frozen=True)
class Said:
    """A text for the listener's method of that name."""

    to: Literal["cell", "note"]
    text: str


@dataclass(frozen=True)
class Statistics:
    """What came of `Calibrate`: the model and its file's content."""

    model: int
    content: bytes


@dataclass(frozen=True)
class End:
    """A task's last message.

    Attributes:
        samples: How many of the task's have their row, whether it was made now or there before.
        error: What ended the task too early: a `UserError`, or a fault of the program.
    """

    samples: int
    error: Exception | None = None


Message = Ready | Said | SampleRow | Statistics | End


class Lost(Exception):
    """A worker is dead; the text says of what."""


class Worker(Silent):
    """A session with its sink and listener, which pass on what they are told."""

    def __init__(self, setup: Setup, tell: Callable[[Message], None]) -> None:
        """Nothing is loaded yet but the statistics.

        Raises:
            UserError: statistics that can't be read.
        """
        import torch

        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
        self._tell, self._known = tell, setup.known
        self._here, self._samples = set[str](), 0
        statistics = {name: from_bytes(content) for name, content in setup.statistics.items()}
        self._session = Session(setup.request, self, self, statistics)
        tell(Ready(kvbench.__version__))

    def run(self, task: Task, arrived: frozenset[str] = frozenset()) -> None:
        """Run a task, but for the rows of these keys: a worker that died had handed them over."""
        self._here, self._samples = set(arrived), 0
        error: Exception | None = None
        try:
            self._run(task)
        except UserError as fault:
            error = UserError(str(fault))
        except BaseException:  # whatever it is, the caller must not wait for ever
            error = RuntimeError(f"a worker failed\n{traceback.format_exc()}")
        self._tell(End(self._samples, error))

    def _run(self, task: Task) -> None:
        if isinstance(task, Calibrate):
            statistics = self._session.calibrate(task.model, task.samples, task.seed)
            self._tell(Statistics(task.model, to_bytes(statistics)))
        else:
            self._session.run(task)

    def has(self, key: str) -> bool:
        """Whether a row needs no run."""
        return key in self._known or key in self._here

    def append(self, row: SampleRow) -> bool:
        """Hand a row over."""
        self._here.add(row.key)
        self._tell(row)
        return True

    def cell(self, label: str) -> None:
        """Pass on a cell's name."""
        self._tell(Said("cell", label))

    def note(self, text: str) -> None:
        """Pass on a note."""
        self._tell(Said("note", text))

    def advance(self) -> None:
        """Count one more sample of the task."""
        self._samples += 1


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
