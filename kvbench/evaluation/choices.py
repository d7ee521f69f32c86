"""The rows and columns of a grid as users name them, checked against the registries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.rows import BOTH, PROTOCOLS
from kvbench.models.find import find_model
from kvbench.registry import (
    METHODS,
    MODELS,
    TASKS,
    canonical_spec,
    configured,
    parse_spec,
    split_specs,
)
from kvbench.specs import suggestion

if TYPE_CHECKING:
    from kvbench.cache import ForeignCache, KVQuantizer
    from kvbench.models.zoo import ModelEntry

_SUITE = "milebench"


@dataclass(frozen=True)
class MethodChoice:
    """A method with its parameters set.

    Attributes:
        spec: Canonical text: the name, with the parameters that differ from the defaults, sorted.
        quantizer: The configured method.
    """

    spec: str
    quantizer: KVQuantizer | ForeignCache


def choose_methods(text: str) -> tuple[MethodChoice, ...]:
    """Read ``"all"`` or ``"kivi,akvq_vl[recent=64]"``; the same choice twice counts once.

    Raises:
        UserError: A method or parameter is unknown, or a value doesn't fit.
    """
    chosen: dict[str, MethodChoice] = {}
    for item in split_specs(text):
        for spec in METHODS.names() if item == "all" else [item]:
            name, parameters = parse_spec(spec)
            default = METHODS.get(name)
            quantizer = configured(default, parameters)
            canonical = canonical_spec(name, default, quantizer)
            chosen[canonical] = MethodChoice(canonical, quantizer)
    return tuple(chosen.values())


def choose_models(text: str) -> tuple[ModelEntry, ...]:
    """Read ``"all"`` (that see images) or ``"smol_llava,llava15_7b=/folder"``.

    A folder replaces the model's hub id.

    Raises:
        UserError: A model is unknown, its folder is missing, or it is given in two ways.
    """
    chosen: dict[str, ModelEntry] = {}
    for item in split_specs(text):
        for each in _with_vision() if item == "all" else [item]:
            entry = find_model(each)
            if chosen.setdefault(entry.name, entry) != entry:
                raise UserError(f"model {entry.name!r} is given in two ways: keep one")
    return tuple(chosen.values())


def _with_vision() -> list[str]:
    return [name for name in MODELS.names() if MODELS.get(name).family != "text"]


def choose_tasks(text: str) -> tuple[str, ...]:
    """Read ``"all"`` (MileBench's twelve) or ``"oe,easy_vqa"``; a task named twice counts once.

    Raises:
        UserError: A task is unknown.
    """
    chosen: dict[str, None] = {}
    for item in split_specs(text):
        for name in suite() if item == "all" else [item]:
            TASKS.get(name)
            chosen[name] = None
    return tuple(chosen)


def suite() -> list[str]:
    """The tasks that "all" stands for: kvbench's own, whatever plug-ins there are."""
    return [name for name in TASKS.builtin() if TASKS.get(name).suite == _SUITE]


def choose_protocols(text: str) -> tuple[str, ...]:
    """Read ``"both"`` (those that every method follows) or protocols by name.

    Raises:
        UserError: A protocol is unknown.
    """
    if text == "both":
        return BOTH
    names = split_specs(text)
    for name in names:
        if name not in PROTOCOLS:
            known = suggestion(name, (*PROTOCOLS, "both"), "use one of")
            raise UserError(f"unknown protocol {name!r}: {known}")
    return tuple(protocol for protocol in PROTOCOLS if protocol in names)


def existing_folder(what: str, path: Path | None) -> None:
    """Refuse a path that isn't a folder; None passes.

    Raises:
        UserError: It doesn't exist or isn't a folder; the message begins with `what`.
    """
    if path is not None and not path.is_dir():
        fault = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{what} {path} {fault}: correct the path")
