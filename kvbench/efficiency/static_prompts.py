"""Prompts of some rows of a static cache: exact attention, stored as they go, nothing awaited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.cache.attention import attention
from kvbench.cache.contract import LayerQuantizer, LayerSpec, Tokens
from kvbench.efficiency.static_cache import StaticCache
from kvbench.kernels.attention import decode_attention


class StaticPrompts:
    """Stores prompts layer by layer and attends to them as `exact_prefill` says.

    A plan is asked with its facts on the device, so that lengths of precisions never pass through
    the host: it would wait for all the work of the layers before.
    """

    def __init__(
        self,
        cache: StaticCache,
        quantizers: Sequence[LayerQuantizer],
        rows: slice,
        is_vision: Tensor,
    ) -> None:
        """Prompts without padding for `rows` of the cache; is_vision is (b, n) on its device."""
        self._cache, self._quantizers, self._rows = cache, quantizers, rows
        self._is_vision, self._valid = is_vision, torch.ones_like(is_vision)

    @property
    def count(self) -> int:
        """Rows."""
        return len(self._valid)

    def spec(self, index: int) -> LayerSpec:
        """The layer's shape."""
        return self._cache.layers[index].spec

    def attend(
        self, index: int, module: Any, query: Tensor, keys: Tensor, values: Tensor, residual: Tensor
    ) -> Tensor:
        """(b, Hq, n, D): exact for all queries but the last, which sees what is stored.

        query is (b, Hq, n, D), keys and values (b, H, n, D) after rotary embedding, residual (b, n,
        hidden) the stream that enters the layer.
        """
        quantizer = self._quantizers[index]
        out, _ = attention(module, query, keys, values, None, scaling=module.scaling)
        bits = quantizer.plan.prompt(Tokens(self._valid, self._is_vision, residual))
        stored = (quantizer.key.transform.store(keys), quantizer.value.transform.store(values))
        spans = self._cache.fill(self._rows, index, *stored, bits)
        last = quantizer.key.transform.attend(query[:, :, -1:])[:, :, 0]
        out[:, -1] = decode_attention(last.contiguous(), spans, module.scaling)
        return out.transpose(1, 2)
