"""Models and data on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.doctor.findings import Finding, Status
from kvbench.errors import UserError
from kvbench.registry import MODELS, TASKS

if TYPE_CHECKING:
    from kvbench.models.zoo import ModelEntry
    from kvbench.tasks.base import Task


def models(chosen: ModelEntry | None) -> Iterator[Finding]:
    """Every model of the zoo, and the chosen one if it has a folder of its own."""
    for name in MODELS.names():
        try:
            entry = MODELS.get(name)
        except UserError as error:
            yield Finding("models", Status.FAIL, name, "broken plug-in", str(error))
            continue
        yield _model(chosen if chosen is not None and chosen.name == name else entry)
    if chosen is not None and chosen.name not in MODELS.names():
        yield _model(chosen)


def _model(entry: ModelEntry) -> Finding:
    from kvbench.models.folders import checkpoint_folder

    if entry.folder is None and entry.loader is not None:
        return Finding("models", Status.OK, entry.name, "bundled")
    try:
        return Finding("models", Status.OK, entry.name, str(checkpoint_folder(entry)))
    except UserError as error:
        return Finding("models", Status.NOTE, entry.name, "not usable here", str(error))


def data(root: Path | None) -> Iterator[Finding]:
    """The samples of every task, read as a run would read them."""
    for name in TASKS.names():
        try:
            task = TASKS.get(name)
        except UserError as error:
            yield Finding("data", Status.FAIL, name, "broken plug-in", str(error))
            continue
        yield _task(name, task, root)


def _task(name: str, task: Task, root: Path | None) -> Finding:
    from kvbench.tasks.base import dataset_name

    try:
        folder = root or task.default_root()
        if root is not None and not (root / task.folder).exists():
            text = f"{root} has no folder {task.folder}"
            advice = f"unpack it there, or leave {name} out of --tasks"
            return Finding("data", Status.NOTE, name, text, advice)
        samples = len(task.load(folder).samples)
    except UserError as error:
        return Finding("data", Status.FAIL, name, "can't be read", str(error))
    return Finding("data", Status.OK, name, f"{samples} samples, {dataset_name(folder)}")
