"""``kvbench list``: what the registries know, broken plug-ins included."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from kvbench.errors import UserError


class Kind(StrEnum):
    """What can be listed."""

    METHODS = "methods"
    MODELS = "models"
    TASKS = "tasks"


def listing(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these, with what is written about each.")
    ] = None,
) -> None:
    """List methods, models or tasks, with what --methods, --models and --tasks call them.

    With names, also what is written about each: what it does and what its parameters mean.
    """
    from tabulate import tabulate

    from kvbench.registry import METHODS, MODELS, TASKS, Registry

    registries: dict[Kind, Registry[Any]] = {
        Kind.METHODS: METHODS,
        Kind.MODELS: MODELS,
        Kind.TASKS: TASKS,
    }
    registry, (heads, cells) = registries[kind], _COLUMNS[kind]
    if names:
        typer.echo("\n\n".join(_entry(name, heads, cells, registry.get(name)) for name in names))
        return
    rows, broken = [], []
    for name in registry.names():
        try:
            rows.append((name, *cells(registry.get(name))))
        except UserError as error:
            broken.append(f"broken: {error}")
    hint = f"What parameters mean, None among them: kvbench list {kind} NAME"
    more = [hint] if kind is Kind.METHODS else []
    typer.echo("\n".join([tabulate(rows, ("name", *heads)), *broken, *more]))


def _entry(
    name: str, heads: tuple[str, ...], cells: Callable[[Any], tuple[str, ...]], found: Any
) -> str:
    from tabulate import tabulate

    rows = zip(("name", *heads), (name, *cells(found)), strict=True)
    return f"{tabulate(rows, tablefmt='plain')}\n\n{inspect.getdoc(type(found)) or ''}".rstrip()


def _method(method: Any) -> tuple[str, ...]:
    from kvbench.efficiency.capacity import nominal_bits

    storage = "packed" if hasattr(method, "layer") else "its own"  # a peer brings a whole cache
    parameters = ", ".join(
        f"{field.name}={getattr(method, field.name)}" for field in dataclasses.fields(method)
    )
    try:
        bits = nominal_bits(method)
    except UserError:  # it stores other layers only
        bits = "-"
    return (method.label, method.paper, bits, storage, parameters)


def _model(model: Any) -> tuple[str, ...]:
    return (model.label, model.family, str(model.folder or model.hub_id or model.loader))


def _task(task: Any) -> tuple[str, ...]:
    return (task.label, task.title, task.folder, task.suite)


_COLUMNS: dict[Kind, tuple[tuple[str, ...], Callable[[Any], tuple[str, ...]]]] = {
    Kind.METHODS: (("label", "paper", "bits", "storage", "parameters"), _method),
    Kind.MODELS: (("label", "family", "from"), _model),
    Kind.TASKS: (("label", "title", "folder", "suite"), _task),
}
