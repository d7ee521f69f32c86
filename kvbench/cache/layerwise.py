"""Methods whose layers can be stored in different ways, so that the ways can be searched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, Self, runtime_checkable

from kvbench.cache.contract import KVQuantizer


@runtime_checkable
class LayerwiseQuantizer(KVQuantizer, Protocol):
    """A method that takes one of a few choices for each layer."""

    layer_choices: ClassVar[tuple[str, ...]]
    """Ways to store a layer."""

    def with_layers(self, choices: Sequence[str]) -> Self:
        """The same method with a choice for each layer, in order."""
