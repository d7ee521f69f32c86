"""Dataclasses that stand in files as one line of JSON each, checked both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvbench.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def check_types(row: DataclassInstance) -> None:
    """Check that every field holds what it is annotated with.

    Raises:
        UserError: A value has the wrong type, isn't one of its Literal, or isn't finite.
    """
    for name, (allowed, choices) in _types(type(row)).items():
        value = getattr(row, name)
        # A bool is an int in Python, but not in a row.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            written = row.__dataclass_fields__[name].type
            raise UserError(f"result row: {name} is {value!r}, but must be {written}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"result row: {name} is {value!r}, but must be finite")
        if choices and value not in choices:
            raise UserError(f"result row: {name} is {value!r}, but must be one of {choices}")


def to_line(row: DataclassInstance) -> str:
    """Return a row as one line of JSON, without the newline."""
    return json.dumps(dataclasses.asdict(row), allow_nan=False)


def fields_of(
    line: str,
    row: type[DataclassInstance],
    schema: int,
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Return the values in a line, one for each field of the class.

    `renewed` makes values of an older schema those of today's, and leaves all others alone.

    Raises:
        UserError: The text is no JSON object, another schema's, or lacks or adds a field.
    """
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a result row is no JSON ({error}): delete that line") from error
    if not isinstance(data, dict):
        raise UserError("a result row is no JSON object: delete that line")
    data = renewed(data)
    if data.get("schema") != schema:
        raise UserError(
            f"result row of schema {data.get('schema')!r}, but this kvbench reads schema "
            f"{schema}: use the version that wrote it, or a new output folder"
        )
    expected = {field.name for field in dataclasses.fields(row)}
    if odd := sorted(expected ^ data.keys()):
        raise UserError(
            f"result row lacks or adds {', '.join(odd)}: it wasn't written by this kvbench"
        )
    return data


@functools.cache
def _types(row: type) -> dict[str, tuple[tuple[type, ...], tuple[object, ...]]]:
    """What each field may hold: types, and the values of a Literal.

    A whole number will do for a float, as in JSON.
    """
    found = {}
    for name, annotation in get_type_hints(row).items():
        union = get_origin(annotation) in (UnionType, Union)
        options = get_args(annotation) if union else (annotation,)
        choices = tuple(c for o in options if get_origin(o) is Literal for c in get_args(o))
        plain = tuple(get_origin(o) or o for o in options if get_origin(o) is not Literal)
        plain += tuple({type(choice) for choice in choices})
        found[name] = ((*plain, int) if float in plain else plain, choices)
    return found
