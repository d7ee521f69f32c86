"""lm-eval's tasks by name: found, judged by their output type, and loaded from local data only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from kvbench.errors import UserError
from kvbench.specs import suggestion

_GENERATIVE = "generate_until"


def local_tasks(
    names: Sequence[str], include: Path | None, *, images: bool, limit: int | None
) -> tuple[TaskManager, int]:
    """Find tasks, groups or tags, and see that they can be answered from a cache.

    lm-eval's own tasks are looked through only if a name isn't in the included folder: there are
    many thousand.

    Args:
        names: What to run.
        include: Folder with YAML files of more tasks; those go before lm-eval's of the same name.
        images: Whether the model takes images.
        limit: At most so many documents a task.

    Returns:
        The manager that knows the tasks, and how many documents they have in all.

    Raises:
        UserError: A name is unknown, a task asks for log-likelihoods, its data are not on this
            machine, or it can't be read.
    """
    manager = _manager(names, include)
    for name in names:
        for task, kind in _output_types(manager.task_index, name, {}):
            _check_type(task, kind)
    documents = 0
    for name in names:
        for task in _loaded(manager, name):
            documents += _checked(task, images, limit)
    return manager, documents


def _manager(names: Sequence[str], include: Path | None) -> TaskManager:
    paths = [str(include)] if include else []
    manager = TaskManager(include_path=paths, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=paths)
    for name in names:
        if name not in manager.all_tasks:
            known = suggestion(name, manager.all_tasks, "known are")
            hint = known if known.startswith("did you mean") else "see `lm-eval ls tasks`"
            raise UserError(f"unknown lm-eval task {name!r}: {hint}, or name its folder: --include")
    return manager


def _output_types(
    index: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """(task, output type) of a task, or of all tasks of a group or tag; no data are loaded."""
    entry = index.get(name)
    if entry is None:  # a group's task that is defined in place
        yield name, str(overrides.get("output_type", _GENERATIVE))
        return
    config = load_yaml(entry.yaml_path, resolve_func=False) if entry.yaml_path else {}
    merged = {**config, **overrides}
    if entry.kind.name == "TAG":
        children: Sequence[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        children = merged.get("task") or ()
    else:
        if entry.kind.name == "TASK":  # one that is written in Python is judged when it is made
            yield name, str(merged.get("output_type", _GENERATIVE))
        return
    for child in children:
        own = child if isinstance(child, dict) else {"task": child}
        yield from _output_types(index, str(own.get("group", own.get("task"))), own)


def _check_type(task: str, kind: str | None) -> None:
    if kind != _GENERATIVE:
        raise UserError(
            f"the task {task} asks for {kind}, not {_GENERATIVE}: log-likelihoods come from one "
            "pass over prompt and answer that never reads a stored cache, so every method would "
            "look lossless; use a task that generates, or kvbench perplexity"
        )


def _loaded(manager: TaskManager, name: str) -> list[Any]:
    with _read(name, "can't be loaded"):
        return list(manager.load([name])["tasks"].values())


def _checked(task: Any, images: bool, limit: int | None) -> int:
    """Documents that a task will ask for, once it is known to fit and its first prompt was made."""
    name = task.task_name
    _check_type(name, task.OUTPUT_TYPE)
    if getattr(task, "MULTIMODAL", False) and not images:
        raise UserError(f"the task {name} shows images, which this model takes none of: use a VLM")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"the task {name} runs code that a model wrote: kvbench does not do that")
    with _read(name, "has a document that makes no prompt"):
        task.build_all_requests(limit=1, rank=0, world_size=1)
        count = len(task.eval_docs)
    return count if limit is None else min(count, limit)


@contextmanager
def _read(name: str, fault: str) -> Iterator[None]:
    """Tell what can be done when a task's files or data can't be used."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled

    missing = (DatasetNotFoundError, OfflineModeIsEnabled, ConnectionError, FileNotFoundError)
    try:
        yield
    except UserError:
        raise
    except missing as error:
        raise UserError(
            f"the data of the task {name} are not on this machine ({_first_line(error)}), and "
            "kvbench downloads nothing: fetch them with `hf download --repo-type dataset NAME`, or "
            "write a YAML file that reads your own copy and name its folder with --include"
        ) from error
    except Exception as error:  # a task is foreign code and may raise anything
        raise UserError(
            f"the task {name} {fault} ({type(error).__name__}: {_first_line(error)}): correct its "
            "files"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
