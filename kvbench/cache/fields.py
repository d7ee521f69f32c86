"""Hyper-parameters checked against the types they are declared with."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kvbench.errors import UserError


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def check_fields(instance: Any) -> None:
    """Hold every int, float, bool, str, Literal and `X | None` field against its annotation.

    Raises:
        UserError: a value has another type, isn't finite, or is none of the choices.
    """
    hints = _hints(instance.__class__)
    for field in fields(instance):
        value, kind = getattr(instance, field.name), hints[field.name]
        if not _fits(value, kind):
            raise UserError(
                f"{type(instance).__name__}'s {field.name} must be {_expected(kind)}, "
                f"not {value!r}."
            )


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is UnionType:
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is NoneType:
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return True


def _expected(kind: Any) -> str:
    if get_origin(kind) is UnionType:
        return " or ".join(map(_expected, get_args(kind)))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    texts = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        NoneType: "None",
    }
    return texts[kind]
