"""Which fields of a method change its size, and to what they may be set.

A method says so itself in a class variable, `size_knobs: ClassVar[dict[str, tuple[Any, ...]]]`,
from fields to candidate values; one that doesn't is turned by the fields it shares with others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.choices import MethodChoice
from kvbench.registry import METHODS, canonical_spec, parse_spec

if TYPE_CHECKING:
    from kvbench.cache import KVQuantizer

_EXACT_TOKENS = (0, 4, 8, 16, 32, 64, 128)
_SHARED: Mapping[str, tuple[int, ...]] = {
    "bits": (2, 3, 4, 8),
    "text_bits": (4, 8),
    "group_size": (16, 32, 64, 128),
    "recent": _EXACT_TOKENS,
    "window": _EXACT_TOKENS,
    "residual": _EXACT_TOKENS[2:],
}


@dataclass(frozen=True)
class Candidate:
    """A setting of a method.

    Attributes:
        name: The method as the user named it.
        choice: The setting.
        changes: How many fields differ from what the user named.
    """

    name: str
    choice: MethodChoice
    changes: int


def size_knobs(choice: MethodChoice) -> dict[str, tuple[Any, ...]]:
    """Candidate values of a method's fields; what the user has set is left alone."""
    method: Any = choice.quantizer
    default = METHODS.get(parse_spec(choice.spec)[0])
    fields = [field.name for field in dataclasses.fields(method)]
    declared = getattr(type(method), "size_knobs", _SHARED)
    return {
        name: values
        for name, values in declared.items()
        if name in fields and getattr(method, name) == getattr(default, name)
    }


def candidates(choice: MethodChoice) -> Iterator[Candidate]:
    """Every combination of the knobs' values and the method's own that the method accepts."""
    own: Any = choice.quantizer
    name = parse_spec(choice.spec)[0]
    default = METHODS.get(name)
    knobs = {
        field: dict.fromkeys((getattr(own, field), *values))
        for field, values in size_knobs(choice).items()
    }
    for values in product(*knobs.values()):
        setting = dict(zip(knobs, values, strict=True))
        try:
            method: KVQuantizer = dataclasses.replace(own, **setting)
        except UserError:
            continue  # values that exclude each other
        changes = sum(getattr(own, field) != value for field, value in setting.items())
        spec = canonical_spec(name, default, method)
        yield Candidate(choice.spec, MethodChoice(spec, method), changes)
