"""A grid spread over processes of one machine; only the parent writes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

from kvbench.errors import UserError
from kvbench.evaluation.calibration import calibrated
from kvbench.evaluation.hardware import load
from kvbench.evaluation.progress import Progress, Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job, Session, calibration
from kvbench.evaluation.store import Store


@dataclass
class _Outcome:
    """What came of a job: its rows, what was said on the way, and what went wrong, if anything."""

    rows: list[SampleRow] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    advances: int = 0
    fault: str | None = None


class _Worker(Silent):
    """A process's session with its sink and listener: both fill the outcome of the job under way.

    `known` are keys of rows that need no run.
    """

    def __init__(self, request: EvalRequest, known: frozenset[str]) -> None:
        self._known, self._outcome = known, _Outcome()
        self._session = Session(request, self, self)

    def run(self, job: Job) -> _Outcome:
        """Run a job; a `UserError` becomes its fault, so that rows before it are not lost."""
        self._outcome = _Outcome()
        try:
            self._session.run(job)
        except UserError as error:
            self._outcome.fault = str(error)
        return self._outcome

    def has(self, key: str) -> bool:
        return key in self._known or any(row.key == key for row in self._outcome.rows)

    def append(self, row: SampleRow) -> bool:
        self._outcome.rows.append(row)
        return True

    def cell(self, label: str) -> None:
        self._outcome.cells.append(label)

    def note(self, text: str) -> None:
        self._outcome.notes.append(text)

    def advance(self) -> None:
        self._outcome.advances += 1


_worker: _Worker


def run_jobs(request: EvalRequest, jobs: Sequence[Job], store: Store, progress: Progress) -> None:
    """Run jobs in `request.workers` fresh processes and store their rows as jobs end.

    Raises:
        UserError: what a worker raised, or a worker died; rows so far are kept.
    """
    if calibrated(request.methods):  # once, so that workers find the statistics made
        for entry in request.models:
            calibration(load(entry, request.device, request.dtype), request, progress)
    known = frozenset(row.key for row in store.rows() if store.has(row.key))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(request.workers, context, _start, (request, known)) as pool:
        try:
            said: set[str] = set()
            for future in as_completed([pool.submit(_run, job) for job in jobs]):
                _take(future.result(), store, progress, said)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died, perhaps for want of memory: start again with fewer "
                "--workers to go on; the rows so far are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _take(outcome: _Outcome, store: Store, progress: Progress, said: set[str]) -> None:
    """Store a job's rows and pass on what was said, each text once for all workers."""
    for row in outcome.rows:
        store.append(row)
    for tell, texts in ((progress.cell, outcome.cells), (progress.note, outcome.notes)):
        for text in texts:
            if text not in said:
                said.add(text)
                tell(text)
    for _ in range(outcome.advances):
        progress.advance()
    if outcome.fault is not None:
        raise UserError(outcome.fault)


def _start(request: EvalRequest, known: frozenset[str]) -> None:
    global _worker
    import torch

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent speaks for all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(torch.get_num_threads() // request.workers, 1))
    _worker = _Worker(replace(request, workers=1), known)


def _end_with_parent() -> None:
    """A parent that was killed can't tell its workers, which would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: Job) -> _Outcome:
    return _worker.run(job)
