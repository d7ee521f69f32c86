"""Generation at the device's limit: prompts in micro-batches, a static cache, one captured step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbench.cache.argument import cache_argument
from kvbench.cache.folding import fold_values
from kvbench.cache.observers import image_token_ids
from kvbench.cache.quantized import BoundMethod
from kvbench.efficiency.decoder import FusedDecoder, unsupported_model
from kvbench.efficiency.prompts import embedded
from kvbench.efficiency.static_cache import StaticCache
from kvbench.efficiency.static_prompts import StaticPrompts
from kvbench.efficiency.support import unsupported
from kvbench.efficiency.workload import Workload
from kvbench.kernels import attention

Prompts = Mapping[str, Tensor]
"""Keyword arguments of a model's forward for some rows."""


class Engine(Protocol):
    """Runs a workload: all prompts, then step after step. Tokens are chosen greedily."""

    path: str
    """"graph", "fused: why there is no graph", or "eager: why"."""
    outputs: Tensor
    """(B, output tokens) int64."""

    @property
    def cache_nbytes(self) -> int:
        """Bytes that keys and values take now."""

    @property
    def packed_tokens_read(self) -> int:
        """Tokens taken from below 16 bits while decoding, over layers, rows and steps."""

    def prefill(self, first_row: int, prompts: Prompts) -> None:
        """Take the next rows' prompts and choose their first tokens."""

    def decode(self) -> None:
        """One more token for every row."""

    def forget(self) -> None:
        """Be ready for other prompts."""


def make_engine(model: PreTrainedModel, bound: BoundMethod, workload: Workload) -> Engine:
    """The fastest engine that a method and a model can have."""
    reason = unsupported(bound, workload) or unsupported_model(model)
    if reason is None and model.device.type == "cuda":
        reason = _unreadable(bound, workload, model.dtype)
    if reason is not None:
        return EagerEngine(model, bound, workload, reason)
    return StaticEngine(model, bound, workload)


def _unreadable(bound: BoundMethod, workload: Workload, dtype: torch.dtype) -> str | None:
    """Why the attention kernel can't read such a cache: torch's path can't be captured."""
    cache = StaticCache(bound, replace(workload, batch=1), dtype, torch.device("meta"))
    cache.begin()
    for index, layer in enumerate(cache.layers):
        shape = (1, layer.spec.num_heads, layer.spec.head_dim)
        query = torch.empty(shape, dtype=dtype, device="meta")
        if reason := attention.unsupported(query, cache.spans(index)):
            return reason
    return None


class StaticEngine:
    """A static cache, value transforms folded into the weights, and a captured step on CUDA."""

    def __init__(self, model: PreTrainedModel, bound: BoundMethod, workload: Workload) -> None:
        """Change the model's weights for good, allocate everything and capture the step."""
        self._model, self._bound = model, fold_values(bound)
        self._decoder = FusedDecoder(model)
        device = model.device
        self.cache = StaticCache(self._bound, workload, model.dtype, device)
        self.outputs = torch.zeros(
            workload.batch, workload.output_tokens, dtype=torch.int64, device=device
        )
        self._tokens = torch.zeros(workload.batch, dtype=torch.int64, device=device)
        self._place = torch.zeros((), dtype=torch.int64, device=device)
        self._graph = self._captured() if device.type == "cuda" else None
        self.path = "graph" if self._graph else "fused: graphs need CUDA"

    @property
    def cache_nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.cache.nbytes

    @property
    def packed_tokens_read(self) -> int:
        """Tokens taken from below 16 bits while decoding, over layers, rows and steps.

        Raises:
            UserError: A prompt did not fit.
        """
        self.cache.check()
        return int(self.cache.packed_tokens_read.item())

    @torch.no_grad()
    def prefill(self, first_row: int, prompts: Prompts) -> None:
        """Run prompts, storing them as they go. They have no padding."""
        ids = prompts["input_ids"]
        rows = slice(first_row, first_row + len(ids))
        images = torch.zeros_like(ids, dtype=torch.bool)
        for token in image_token_ids(self._model.config):
            images |= ids == token
        store = StaticPrompts(self.cache, self._bound.quantizers, rows, images)
        logits = self._decoder.prefill(embedded(self._model, prompts), store)
        self._tokens[rows] = self.outputs[rows, 0] = logits.argmax(-1)
        self._place.fill_(1)

    @torch.no_grad()
    def decode(self) -> None:
        """Replay the captured step."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def forget(self) -> None:
        """Be ready for other prompts."""
        self.cache.reset()

    def _step(self) -> None:
        tokens = self._decoder.step(self._tokens, self.cache).argmax(-1)
        self._tokens.copy_(tokens)
        place = self._place.clamp_max(self.outputs.shape[1] - 1)
        self.outputs.index_copy_(1, place[None], tokens[:, None])
        self._place += 1

    @torch.no_grad()
    def _captured(self) -> torch.cuda.CUDAGraph:
        """Compile every kernel on made-up rows, capture the step, and forget the rows."""
        self.cache.reset()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.cache.reset()
        return graph


class EagerEngine:
    """What a static cache can't hold: the reference cache, through the model's own forward."""

    def __init__(
        self, model: PreTrainedModel, bound: BoundMethod, workload: Workload, reason: str
    ) -> None:
        """An empty cache for all rows; `reason` says why there is no static one."""
        self._model, self._cache = model, bound.new_cache()
        self._rows, self._pending = workload.batch, list[Prompts]()
        self.path = f"eager: {reason}"
        self.outputs = torch.zeros(
            workload.batch, workload.output_tokens, dtype=torch.int64, device=model.device
        )
        self._place = 0

    @property
    def cache_nbytes(self) -> int:
        """Bytes that the cache holds."""
        return self._cache.nbytes()

    @property
    def packed_tokens_read(self) -> int:
        """Tokens taken from below 16 bits, over layers, rows and steps."""
        return self._cache.packed_tokens_read

    def prefill(self, first_row: int, prompts: Prompts) -> None:
        """Gather the prompts; the last of them starts all, since rows can't join a cache later."""
        self._pending.append(prompts)
        if first_row + len(prompts["input_ids"]) < self._rows:
            return
        together = {
            name: torch.cat([one[name] for one in self._pending]) for name in self._pending[0]
        }
        self._pending.clear()
        self._forward(together)

    def decode(self) -> None:
        """One forward call of the model."""
        self._forward({"input_ids": self.outputs[:, self._place - 1, None]})

    def forget(self) -> None:
        """Be ready for other prompts."""
        self._cache.reset()
        self._place = 0

    @torch.no_grad()
    def _forward(self, inputs: Prompts) -> None:
        given = cache_argument(self._model, self._cache)
        out = self._model(**inputs, **given, use_cache=True, logits_to_keep=1)
        self.outputs[:, self._place] = out.logits[:, -1].argmax(-1)
        self._place += 1
