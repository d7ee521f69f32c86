"""How a model's call takes a cache, whose name transformers changed."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

from transformers import Cache


def cache_argument(model: Any, cache: Cache) -> dict[str, Cache]:
    """The cache by the name that `model(...)` and `model.generate(...)` take it by.

    That is `cache` from transformers 5.24 on, where the older `past_key_values` warns until it
    goes; models that are defined elsewhere may keep the older one.
    """
    kind: Any = type(model)
    return {_name(kind): cache}


@lru_cache
def _name(kind: Any) -> str:
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"
