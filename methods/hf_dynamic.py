"""transformers' own 16-bit cache, which grows by concatenation: what `generate` uses unasked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from transformers import Cache, DynamicCache

from kvbench.cache import ForeignCache
from kvbench.cache.contract import Protocols


@dataclass(frozen=True)
class HFDynamic:
    """`transformers.DynamicCache` as it is: every token exact, in the model's own dtype."""

    label: ClassVar[str] = "HF DynamicCache"
    paper: ClassVar[str] = "-"
    splits_prompt: ClassVar[bool] = False
    concatenates: ClassVar[bool] = True

    def cache(self, model: nn.Module, protocol: Protocols) -> Cache:
        """An empty cache; both protocols are the same where nothing is quantized."""
        return DynamicCache(config=model.config)  # type: ignore[arg-type]

    def nbytes(self, cache: Cache) -> int:
        """Bytes of all keys and values."""
        states = (getattr(layer, side) for layer in cache.layers for side in ("keys", "values"))
        return sum(tensor.nbytes for tensor in states if isinstance(tensor, Tensor))


METHODS: dict[str, ForeignCache] = {"hf_dynamic": HFDynamic()}
