"""Rows of results, each field settable; small grids on tiny models and drawn data."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow

FIELDS: dict[str, Any] = {
    "schema": 1,
    "key": "k0",
    "model": "tiny",
    "revision": "r1",
    "dtype": "float32",
    "method": "rtn_int2",
    "storage": "packed",
    "protocol": "quantized_prefill",
    "dataset": "minimile-1-seed0",
    "task": "oe",
    "task_version": 1,
    "sample_id": 0,
    "prompt_style": "chatml",
    "prompt_sha256": "p0",
    "images_sha256": "i0",
    "generation": {"max_new_tokens": 16, "do_sample": False},
    "calibration": "",
    "batch": 1,
    "version": "0.1.0",
    "status": "ok",
    "error": None,
    "answer": "B. red circle",
    "extracted": "B",
    "correct": True,
    "strict": True,
    "empty": False,
    "unparsable": False,
    "images_kept": 4,
    "images_total": 4,
    "truncated": False,
    "prompt_tokens": 300,
    "generated_tokens": 5,
    "cache_bytes": 1000,
    "bits_per_element": 2.5,
    "packed_tokens_read": 1500,
    "kl_first": 0.25,
    "kl_mean": 0.5,
    "agrees": True,
    "seconds": {"total": 0.5},
}
FAILED: dict[str, Any] = {
    "error": "out of memory",
    **dict.fromkeys(("answer", "extracted", "correct", "strict", "empty", "unparsable")),
}


@pytest.fixture
def fields() -> dict[str, Any]:
    """The fields of a valid row."""
    return dict(FIELDS)


@pytest.fixture
def make_row() -> Callable[..., SampleRow]:
    """Make a row; a status other than ok takes the answer away."""

    def make(**changes: Any) -> SampleRow:
        failed = FAILED if changes.get("status", "ok") != "ok" else {}
        return SampleRow(**{**FIELDS, **failed, **changes})

    return make


class Listener(Silent):
    """Remembers what an evaluation says."""

    def __init__(self) -> None:
        self.total = self.advanced = 0
        self.cells: list[str] = []
        self.notes: list[str] = []

    def begin(self, total: int, done: int) -> None:
        self.total = total

    def cell(self, label: str) -> None:
        self.cells.append(label)

    def advance(self) -> None:
        self.advanced += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def listener() -> Listener:
    """A listener with `total`, `advanced`, `cells` and `notes`."""
    return Listener()


class Killer(Listener):
    """Kills a worker once so many samples have their rows.

    A worker is a process that was started by this one, however indirectly, and says so.
    """

    def __init__(self, mark: str, after: int) -> None:
        super().__init__()
        self._mark, self._after, self.killed = mark, after, 0
        self._before = set(psutil.Process().children(recursive=True))
        self.family: list[psutil.Process] = []
        """All processes that the run had started when it killed, and the workers among them."""
        self.workers: list[psutil.Process] = []

    def advance(self) -> None:
        super().advance()
        if self.advanced == self._after:
            children = psutil.Process().children(recursive=True)
            self.family = [child for child in children if child not in self._before]
            self.workers = list(filter(self._is_worker, self.family))
            victim = max(self.workers, key=lambda process: sum(process.cpu_times()[:2]))
            os.kill(victim.pid, signal.SIGKILL)
            self.killed = victim.pid

    def _is_worker(self, process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            return self._mark in " ".join(process.cmdline())
        return False


@pytest.fixture
def killer() -> type[Killer]:
    """A listener that kills a worker: `killer(mark in its command line, after so many rows)`."""
    return Killer


@pytest.fixture
def still_running() -> Callable[[list[psutil.Process]], list[psutil.Process]]:
    """Which of some processes have not ended within 20 s; they are killed."""

    def runs(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to collect it
        except psutil.NoSuchProcess:
            return False

    def find(processes: list[psutil.Process]) -> list[psutil.Process]:
        deadline = time.monotonic() + 20
        while any(map(runs, processes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [process for process in processes if runs(process)]
        for process in left:
            process.kill()
        return left

    return find


@pytest.fixture
def same_results() -> Callable[[Path, Path], None]:
    """Checks that two folders have the same rows, but for the time they took, and tables."""
    from kvbench.evaluation.store import SAMPLES
    from kvbench.report import write_report

    def check(one: Path, other: Path) -> None:
        rows, tables = [], []
        for folder in (one, other):
            lines = (folder / SAMPLES).read_text().splitlines()
            untimed = [json.loads(line) | {"seconds": None} for line in lines]
            rows.append({row["key"]: row for row in untimed})
            assert len(rows[-1]) == len(lines)  # each row once
            tables.append({path.name: path.read_text() for path in write_report(folder)})
        assert rows[0] == rows[1]
        assert tables[0] == tables[1]

    return check


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """minimile's ObjectExistence and WebQA, six samples each; copy it before breaking it."""
    from kvbench.tasks.minimile import make

    root = tmp_path_factory.mktemp("drawn") / "data"
    make(root, samples=6, folders=("ObjectExistence", "WebQA"))
    return root


@pytest.fixture
def grid(drawn: Path, tiny_llava_folder: Path, tmp_path: Path) -> Callable[..., EvalRequest]:
    """A request for short answers of the tiny LLaVA; methods, models and tasks as typed."""
    from kvbench.evaluation import choices

    def make(**changes: Any) -> EvalRequest:
        typed = {"methods": "fp16", "models": f"tiny={tiny_llava_folder}", "tasks": "oe,wqa"}
        typed |= {name: changes.pop(name) for name in typed if name in changes}
        fields: dict[str, Any] = {
            "methods": choices.choose_methods(typed["methods"]),
            "models": choices.choose_models(typed["models"]),
            "tasks": choices.choose_tasks(typed["tasks"]),
            "protocols": ("quantized_prefill",),
            "out": tmp_path / "run",
            "data_root": drawn,
            "device": "cpu",
            "max_new_tokens": 4,
            "calibration_samples": 3,
        }
        return EvalRequest(**fields | changes)

    return make


@pytest.fixture
def evaluated(grid: Callable[..., EvalRequest]) -> Callable[..., list[SampleRow]]:
    """Runs a request of `grid` and returns its rows in the order of the file."""
    from kvbench.evaluation.run import evaluate
    from kvbench.evaluation.store import SAMPLES, read_rows

    def run(progress: Any = None, **changes: Any) -> list[SampleRow]:
        request = grid(**changes)
        evaluate(request, progress or Silent())
        return read_rows(request.out / SAMPLES)

    return run


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder that is empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvbench"
