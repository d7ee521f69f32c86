"""The grid: every model, task, protocol and method, one batch of samples after the other.

All methods answer a batch before the next one begins: images are encoded once, the 16-bit answer is
at hand to measure against, and a run that is cut short has the same samples of every method.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import kvbench
from kvbench.evaluation.environment import environment
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.session import Session
from kvbench.evaluation.store import Store


def evaluate(request: EvalRequest, progress: Progress) -> None:
    """Answer what the store lacks.

    Raises:
        UserError: data, a model, a method or the output folder can't be used; rows so far are kept.
    """
    with Store(request.out) as store:
        session = Session(request, store, progress)
        jobs = session.jobs()
        store.write_run({"request": _plain(request), "environment": environment()})
        samples = sum(job.stop - job.start for job in jobs)
        total = samples * len(request.methods) * len(request.protocols)
        progress.begin(total, len(store.rows()))
        if request.workers > 1:
            from kvbench.evaluation.workers import run_jobs

            run_jobs(request, jobs, store, progress)
            return
        for job in jobs:
            session.run(job)


def _plain(request: EvalRequest) -> dict[str, Any]:
    """The request as JSON values."""
    plain = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in ("methods", "models")
    }
    plain["methods"] = [choice.spec for choice in request.methods]
    plain["models"] = [entry.name for entry in request.models]
    return {**plain, "version": kvbench.__version__}
