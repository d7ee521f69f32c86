"""A cache layer that stores nothing for good: it watches a model run as it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.attention import StoredStates
from kvbench.cache.contract import LayerSpec
from kvbench.cache.observers import Observed


class WatchingLayer(CacheLayerMixin):
    """Is shown the queries, keys and values of every step, and answers for attention."""

    is_sliding = False

    def __init__(self, spec: LayerSpec, observed: Observed) -> None:
        """Nothing seen yet."""
        super().__init__()
        self.spec, self.observed = spec, observed
        self.is_initialized = True
        self.length = 0
        """Tokens that the model takes for cached."""

    @abstractmethod
    def attend(
        self, module: nn.Module, query: Tensor, step: StoredStates, mask: Tensor | None, **how: Any
    ) -> Tensor:
        """Attention output (B, Hq, n, D); `how` is what transformers passes: scaling, softcap."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to make."""

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        """Hand (B, H, n, D) states to the "kvbench" attention function, which asks `attend`."""
        self.length += key_states.shape[2]
        step = StoredStates(self, key_states, value_states)  # type: ignore[arg-type]
        return step, step

    def get_seq_length(self) -> int:
        """Tokens that the model takes for cached."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for transformers' masks: all tokens, even under a window."""
        return self.length + query_length, 0
