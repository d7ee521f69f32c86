"""The grid: every model, task, protocol and method, one batch of samples after the other.

All methods answer a batch before the next one begins: images are encoded once, the 16-bit answer is
at hand to measure against, and a run that is cut short has the same samples of every method.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import Any

import kvbench
from kvbench.evaluation.environment import environment
from kvbench.evaluation.failures import check_faults
from kvbench.evaluation.hardware import check_available
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.session import Session
from kvbench.evaluation.store import Store


def evaluate(request: EvalRequest, progress: Progress) -> None:
    """Answer what the store lacks.

    Raises:
        UserError: data, a model, a method or the output folder can't be used; rows so far are kept.
        Mistake: a method's code raised something; its rows say so, and all others are there.
    """
    for entry in request.models:  # the last one's would else be missed when the others are done
        check_available(entry)
    with Store(request.out) as store, Session(request, store, progress) as session:
        jobs = session.jobs()
        planned = {name: len(session.cell(name).samples) for name in request.tasks}
        store.write_run({"request": _plain(request, planned), "environment": environment()})
        samples = sum(planned.values()) * len(request.models)
        total = samples * len(request.methods) * len(request.protocols)
        progress.begin(total, 0)
        if request.in_workers:
            from kvbench.evaluation.workers import run_jobs

            run_jobs(request, jobs, store, progress)
        else:
            for job in jobs:
                session.run(job)
        check_faults(
            (row.method, row.error or "")
            for row in store.rows()
            if row.status == "error" and store.has(row.key)  # not an earlier run's
        )


def _plain(request: EvalRequest, samples: dict[str, int]) -> dict[str, Any]:
    """The request as JSON values, with the command line and each task's number of samples."""
    plain = {
        field.name: getattr(request, field.name)
        for field in dataclasses.fields(request)
        if field.name not in ("methods", "models")
    }
    plain["methods"] = [choice.spec for choice in request.methods]
    plain["models"] = [entry.name for entry in request.models]
    command = shlex.join(["kvbench", *sys.argv[1:]])
    return {**plain, "samples": samples, "command": command, "version": kvbench.__version__}
