"""Names with parameters as users type them: ``akvq_vl[recent=64,clip=0.7]``.

A method is a frozen dataclass whose fields are its parameters: what may be set, and to what, is
read from the annotations.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kvbench.errors import UserError, fault

T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_BOOLEANS = dict.fromkeys(_TRUE, True) | dict.fromkeys(_FALSE, False)
_SCALARS: dict[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
}
_PAIRS = {"[": "]", "(": ")"}
_FORM = "write name[parameter=value,...]"


def split_specs(text: str) -> list[str]:
    """Split a list at its commas, but not inside brackets: ``"a,b[x=1,y=2]"`` has two items.

    Raises:
        UserError: An item is empty, or brackets don't match.
    """
    items = _split(text)
    if not all(items):
        raise UserError(f"empty name in {text!r}: separate names by single commas")
    return items


def parse_spec(text: str) -> tuple[str, dict[str, str]]:
    """Take ``name[key=value,...]`` apart into the name and the parameters' texts.

    ``a+b`` is short for ``a[base=b]``, a method in front of another.

    Raises:
        UserError: The text is not of that form, or sets a parameter twice.
    """
    first, *behind = _split(text, "+")
    if behind:
        name, own = parse_spec(first)
        if "base" in own or not all(behind):
            raise UserError(f"can't read {text!r}: write one method on either side of the +")
        return name, {**own, "base": "+".join(behind)}
    name, bracket, rest = text.strip().partition("[")
    name = name.strip()
    if not name or "]" in name or (bracket and not rest.endswith("]")):
        raise UserError(f"can't read {text!r}: write name or name[parameter=value,...]")
    parameters: dict[str, str] = {}
    for item in _split(rest[:-1]) if bracket else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (key and equals and value):
            raise UserError(f"can't read {item!r} in {text!r}: {_FORM}")
        if key in parameters:
            raise UserError(f"parameter {key!r} is set twice in {text!r}: set it once")
        parameters[key] = value
    return name, parameters


def configured(instance: T, parameters: Mapping[str, str]) -> T:
    """Return a copy of a frozen dataclass instance with fields set from text.

    Understood are int, float, bool, str, Literal, tuples of them (``(1,2)``), and ``X | None``
    (``none``).

    Raises:
        UserError: A field is unknown, a text doesn't fit the field's type, or ``__post_init__``
            refuses the value.
    """
    if not parameters:
        return instance
    hints = _settable(instance)
    owner = type(instance).__name__
    values: dict[str, Any] = {}
    for key, text in parameters.items():
        if key not in hints:
            raise UserError(
                f"unknown parameter {key!r} of {owner}: {suggestion(key, hints, 'it has')}"
            )
        try:
            values[key] = _convert(text, hints[key])
        except ValueError as error:
            raise UserError(f"parameter {key!r} of {owner} must be {error}, not {text!r}") from None
    try:
        return dataclasses.replace(instance, **values)  # type: ignore[type-var]
    except UserError:
        raise
    except Exception as error:  # a plug-in refuses a value in its own way
        given = ", ".join(f"{key}={text}" for key, text in parameters.items())
        raise UserError(f"{owner} can't be had with {given}: {fault(error)}") from error


def canonical_spec(name: str, default: object, instance: object) -> str:
    """Write `instance` as ``name[...]``, with the fields that differ from `default`, sorted."""
    changed = [
        f"{key}={_text(getattr(instance, key))}"
        for key in sorted(_settable(instance))
        if getattr(instance, key) != getattr(default, key)
    ]
    return f"{name}[{','.join(changed)}]" if changed else name


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """End of a message about an unknown name: the close ones, else `otherwise` and all of them."""
    known = list(known)
    begun = [each for each in known if name and each.startswith(name)]
    if close := begun or difflib.get_close_matches(name, known, n=3):
        return f"did you mean {' or '.join(close)}?"
    return f"{otherwise} {', '.join(known) or 'none'}"


def _split(text: str, separator: str = ",") -> list[str]:
    items, closing = [""], ""
    for character in text:
        if character == separator and not closing:
            items.append("")
            continue
        items[-1] += character
        if character in _PAIRS:
            closing = _PAIRS[character] + closing
        elif character in _PAIRS.values():
            if character != closing[:1]:
                raise UserError(f"brackets don't match in {text!r}: {_FORM}")
            closing = closing[1:]
    if closing:
        raise UserError(f"{closing!r} is missing in {text!r}: {_FORM}")
    return [item.strip() for item in items]


def _settable(instance: object) -> dict[str, Any]:
    """Type of each field that can be given as text, by name."""
    if not dataclasses.is_dataclass(instance):
        return {}
    owner = type(instance)
    try:
        hints = get_type_hints(owner)
    except Exception as error:
        raise UserError(
            f"the annotations of {owner.__module__}.{owner.__name__} can't be read "
            f"({type(error).__name__}: {error}): import the names that they use"
        ) from error
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(instance)
        if field.init and _convertible(hints[field.name])
    }


def _convertible(kind: Any) -> bool:
    if kind in _SCALARS or get_origin(kind) is Literal:
        return True
    if get_origin(kind) in (tuple, Union, types.UnionType):
        parts = [part for part in get_args(kind) if part not in (Ellipsis, types.NoneType)]
        return all(_convertible(part) for part in parts)
    return False


def _convert(text: str, kind: Any) -> Any:
    """Raise ValueError saying what was expected, to be read after "must be"."""
    origin = get_origin(kind)
    if origin is Literal:
        return _choice(text, get_args(kind))
    if origin is tuple:
        return _tuple(text, get_args(kind))
    if origin in (Union, types.UnionType):
        return _union(text, get_args(kind))
    return _scalar(text, kind)


def _scalar(text: str, kind: Any) -> Any:
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(_SCALARS[kind]) from None
    if kind is float and not math.isfinite(value):
        raise ValueError(_SCALARS[kind])
    return value


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    by_text = {_text(choice): choice for choice in choices}
    if text not in by_text:
        raise ValueError(f"one of {', '.join(by_text)}")
    return by_text[text]


def _tuple(text: str, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    inner = text[1:-1] if text.startswith("(") and text.endswith(")") else text
    parts = [part for part in _split(inner) if part]
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(parts) != len(kinds):
        raise ValueError(f"{len(kinds)} values like (1,2)")
    try:
        return tuple(_convert(part, kind) for part, kind in zip(parts, kinds, strict=True))
    except ValueError as error:
        raise ValueError(f"values like (1,2), each {error}") from None


def _union(text: str, kinds: tuple[Any, ...]) -> Any:
    optional = types.NoneType in kinds
    if optional and text.lower() == "none":
        return None
    expected = []
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return _convert(text, kind)
            except ValueError as error:
                expected.append(str(error))
    raise ValueError(" or ".join([*expected, "none"] if optional else expected))


def _text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    return str(value)
