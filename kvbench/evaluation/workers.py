"""A grid spread over processes of one machine; only the parent writes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace

from kvbench.errors import UserError
from kvbench.evaluation.hardware import load
from kvbench.evaluation.progress import Progress, Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job, Session, calibration
from kvbench.evaluation.store import Store


class _Collected:
    """A sink that knows which rows exist and keeps new ones until the job is done."""

    def __init__(self, known: frozenset[str]) -> None:
        self._known, self.rows = known, list[SampleRow]()

    def has(self, key: str) -> bool:
        return key in self._known or any(row.key == key for row in self.rows)

    def append(self, row: SampleRow) -> bool:
        self.rows.append(row)
        return True


_session: Session
_collected: _Collected


def run_jobs(
    request: EvalRequest, jobs: Sequence[Job], store: Store, progress: Progress
) -> None:
    """Run jobs in `request.workers` fresh processes and store their rows as jobs end.

    Raises:
        UserError: what a worker raised; rows so far are kept.
    """
    for entry in request.models:  # once, so that workers find the statistics made
        calibration(load(entry, request.device, request.dtype), request, progress)
    known = frozenset(row.key for row in store.rows() if store.has(row.key))
    context = multiprocessing.get_context("spawn")
    silent = replace(request, workers=1)
    with context.Pool(request.workers, _start, (silent, known)) as pool:
        for result in pool.imap_unordered(_run, jobs):
            if isinstance(result, str):
                raise UserError(result)
            for row in result:
                if store.append(row):
                    progress.advance()


def _start(request: EvalRequest, known: frozenset[str]) -> None:
    global _session, _collected
    _collected = _Collected(known)
    _session = Session(request, _collected, Silent())


def _run(job: Job) -> list[SampleRow] | str:
    """A job's rows, or what went wrong (a UserError's text: exceptions with state don't pickle)."""
    _collected.rows = []
    try:
        _session.run(job)
    except UserError as error:
        return str(error)
    return _collected.rows
