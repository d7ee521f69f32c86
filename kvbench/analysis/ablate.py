"""Sweeps run through the evaluation's store: a point that it holds already costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kvbench.analysis.sweeps import Sweep
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate

SWEEPS = "sweeps.json"


def ablate(
    sweeps: Sequence[Sweep], request: EvalRequest, keep_tasks: bool, progress: Progress
) -> None:
    """Evaluate every point of every sweep beside the 16-bit cache, and note which they were.

    Sweeps on the same tasks share a run, so that a batch is prepared once for all of them.

    Args:
        sweeps: What to run.
        request: Models, protocols, output folder and the rest; its methods are the reference.
        keep_tasks: Whether the request's tasks hold for sweeps that have tasks of their own.
        progress: Who is told.

    Raises:
        UserError: as `evaluate`.
    """
    groups: dict[tuple[str, ...], list[Sweep]] = {}
    for sweep in sweeps:
        tasks = request.tasks if keep_tasks or sweep.tasks is None else sweep.tasks
        groups.setdefault(tasks, []).append(sweep)
    for tasks, members in groups.items():
        choices = (point.choice for sweep in members for point in sweep.points)
        methods = {choice.spec: choice for choice in (*request.methods, *choices)}
        evaluate(replace(request, tasks=tasks, methods=tuple(methods.values())), progress)
    _note(request.out, groups)


def _note(folder: Path, groups: Mapping[tuple[str, ...], Sequence[Sweep]]) -> None:
    """Write which methods make up which sweep, beside those of earlier runs in the folder."""
    path = folder / SWEEPS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for tasks, members in groups.items():
        for sweep in members:
            points = [{"label": p.label, "method": p.choice.spec} for p in sweep.points]
            known[sweep.name] = {
                "title": sweep.title,
                "field": sweep.field,
                "tasks": tasks,
                "points": points,
            }
    write_atomically(path, json.dumps(known, indent=2) + "\n")
