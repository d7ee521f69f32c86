"""Methods that bring a transformers cache of their own, compared with ours as they are."""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from transformers import Cache, PreTrainedModel

from kvbench.cache.contract import Protocols


@runtime_checkable
class ForeignCache(Protocol):
    """A peer: someone else's cache behind a kvbench name."""

    label: ClassVar[str]
    paper: ClassVar[str]
    splits_prompt: ClassVar[bool]
    """Whether the cache hands a prompt back unquantized, so that the prompt's last token must come
    in a call of its own for the first answer token to be computed from stored states."""
    concatenates: ClassVar[bool]
    """Whether it keeps states as they are, in tensors that are copied whole to take a token: all
    that the capacity model must know of it."""

    def cache(self, model: PreTrainedModel, protocol: Protocols) -> Cache:
        """A fresh cache.

        Raises:
            UserError: the package is missing, or the protocol can't be had with it.
        """

    def nbytes(self, cache: Cache) -> int:
        """Bytes of every tensor the cache holds."""
