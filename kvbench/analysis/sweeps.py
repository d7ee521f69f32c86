"""Sweeps over fields of methods: the paper's, by name, and any other from the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.choices import choose_methods
from kvbench.specs import parse_spec, split_specs, suggestion

if TYPE_CHECKING:
    from kvbench.evaluation.choices import MethodChoice

_FIELD = re.compile(r"(?P<method>.+)\.(?P<field>\w+)=(?P<values>.+)")
_FORM = 'write method.field=value,value such as "akvq_vl.recent=0,32,64,128"'


@dataclass(frozen=True)
class Point:
    """One method of a sweep and what tables and axes call it."""

    label: str
    choice: MethodChoice


@dataclass(frozen=True)
class Sweep:
    """Methods that differ in one thing.

    Attributes:
        name: Of its files.
        title: What the paper calls it, or what varies.
        field: The field that varies; None for steps that build on each other.
        points: In order.
        tasks: Where the paper does it; None is up to the user.
    """

    name: str
    title: str
    field: str | None
    points: tuple[Point, ...]
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Paper:
    """A sweep of the paper: `method.field=values`, or methods with labels."""

    title: str
    tasks: tuple[str, ...]
    sweep: str = ""
    steps: tuple[tuple[str, str], ...] = ()


_PAPER = {
    "table3": _Paper(
        "Table III: the components of AKVQ-VL",
        ("st",),
        steps=(
            ("rtn_int2", "RTN (INT2)"),
            ("rtn_int2_wht", "+ WHT"),
            ("rtn_int2_wht_tsa", "+ TSA"),
            ("akvq_vl", "+ PSA"),
        ),
    ),
    "figure8a": _Paper(
        "Figure 8: clip ratio at 2 bits", ("wqa", "dqa"), "akvq_vl.clip=0.6,0.7,0.8,0.9,1.0"
    ),
    "figure8b": _Paper(
        "Figure 8: clip ratio at 4 bits", ("wqa", "dqa"), "akvq_vl.text_clip=0.6,0.7,0.8,0.9,1.0"
    ),
    "figure8c": _Paper("Figure 8: recent tokens", ("dqa",), "akvq_vl.recent=0,32,64,128,256"),
    "figure8d": _Paper("Figure 8: pivot tokens", ("dqa",), "akvq_vl.pivots=0,5,10,15,20"),
}
NAMED = (*_PAPER, "figure8")
"""What `choose_sweeps` knows by name; "paper" is all of them."""


def choose_sweeps(texts: list[str]) -> tuple[Sweep, ...]:
    """Read sweeps: names, ``figure8`` for its four, ``paper`` for all, or method.field=values.

    Raises:
        UserError: a name, method or field is unknown, or a value doesn't fit.
    """
    chosen: dict[str, Sweep] = {}
    for text in texts:
        for each in _expanded(text.strip()):
            sweep = _named(each) if each in _PAPER else _typed(each)
            chosen[sweep.name] = sweep
    return tuple(chosen.values())


def _expanded(text: str) -> list[str]:
    if text == "paper":
        return list(_PAPER)
    return [name for name in _PAPER if name.startswith(text)] if text == "figure8" else [text]


def _named(name: str) -> Sweep:
    paper = _PAPER[name]
    if paper.sweep:
        typed = _typed(paper.sweep)
        return Sweep(name, paper.title, typed.field, typed.points, paper.tasks)
    points = tuple(Point(label, choose_methods(spec)[0]) for spec, label in paper.steps)
    return Sweep(name, paper.title, None, points, paper.tasks)


def _typed(text: str) -> Sweep:
    match = _FIELD.fullmatch(text)
    if match is None:
        known = suggestion(text, (*NAMED, "paper"), "the named ones are")
        raise UserError(f"can't read the sweep {text!r}: {_FORM}; {known}")
    method, field = match["method"], match["field"]
    name, parameters = parse_spec(method)
    points = []
    for value in split_specs(match["values"]):
        settings = ",".join(f"{k}={v}" for k, v in {**parameters, field: value}.items())
        points.append(Point(value, choose_methods(f"{name}[{settings}]")[0]))
    file_name = re.sub(r"[^\w.=-]+", "_", f"{method}.{field}").strip("_")
    return Sweep(file_name, f"{method}: {field}", field, tuple(points))
