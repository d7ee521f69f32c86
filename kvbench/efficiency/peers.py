"""Peers as their users run them: plain greedy `generate` with another cache, all rows at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from kvbench.cache.argument import cache_argument
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.specs import layer_specs
from kvbench.efficiency.clock import Clock
from kvbench.efficiency.prompts import micro_batches
from kvbench.efficiency.request import PROBE_STEPS, TrialRequest, TrialResult
from kvbench.efficiency.shapes import weights_of
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError

PATH = "generate"
_PIECE = 64  # tokens that a probe adds at once: no more than a cache takes in before it packs them


@torch.no_grad()
def run_generate(request: TrialRequest, model: PreTrainedModel, method: object) -> TrialResult:
    """Run a peer's cache on a model that is on its device.

    Raises:
        UserError: The method is one of kvbench's own, or its cache can't be had.
    """
    if not isinstance(method, ForeignCache):
        raise UserError(f"{request.method} is no peer: run it with kvbench's engine.")
    workload = request.workload
    ((_, inputs),) = micro_batches(model, workload, workload.batch, request.seed)
    cache = method.cache(model, request.protocol)
    if request.probe:
        _probe(model, inputs, cache, workload)
        return TrialResult("ok", path=PATH, cache_bytes=method.nbytes(cache))
    # Libraries choose and load their kernels at a first run, which is nobody's speed.
    _generate(model, inputs, method.cache(model, request.protocol), 2, Clock(model.device))
    clock = Clock(model.device)
    _generate(model, inputs, cache, workload.output_tokens, clock)
    times = clock.times(prompts=1)
    stored = method.nbytes(cache)
    return TrialResult(
        "ok", path=PATH, cache_bytes=stored, **times, **_work(model, workload, stored)
    )


class _Marks(LogitsProcessor):
    """Marks the moment at which the logits of every step are there."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._clock.mark()
        return scores


def _generate(
    model: Any, inputs: Mapping[str, Tensor], cache: Any, tokens: int, clock: Clock
) -> None:
    clock.start()
    model.generate(
        **inputs,
        attention_mask=torch.ones_like(inputs["input_ids"]),
        **cache_argument(model, cache),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([_Marks(clock)]),
    )


def _probe(model: Any, inputs: Mapping[str, Tensor], cache: Any, workload: Workload) -> None:
    """Fill the cache to its last tokens with noise instead of decoding them, then take steps."""
    _generate(model, inputs, cache, 1, Clock(model.device))
    batch, held = inputs["input_ids"].shape
    missing = workload.cached_tokens - held
    steps = min(PROBE_STEPS, missing)
    for start in range(0, missing - steps, _PIECE):
        for spec in layer_specs(model.config):
            tokens = min(_PIECE, missing - steps - start)
            shape = (batch, spec.num_kv_heads, tokens, spec.head_dim)
            states = torch.randn(shape, device=model.device, dtype=model.dtype)
            cache.update(states, states.clone(), spec.index)
    token, given = inputs["input_ids"][:, :1], cache_argument(model, cache)
    for length in range(workload.cached_tokens - steps, workload.cached_tokens):
        mask = torch.ones(batch, length + 1, dtype=torch.int64, device=model.device)
        model(input_ids=token, attention_mask=mask, **given, use_cache=True)


def _work(model: PreTrainedModel, workload: Workload, stored: int) -> dict[str, Any]:
    """Parts of the peak, and what a mean decode step must read and multiply.

    A full cache of `stored` bytes is taken to have grown evenly.
    """
    weights = weights_of(model)
    lengths = workload.input_tokens + 1 + workload.cached_tokens
    cache = stored * lengths / 2 / workload.cached_tokens
    known = {
        "weight_bytes": weights.language_bytes,
        "vision_bytes": weights.vision_bytes,
        "workspace_bytes": 0,
    }
    if model.device.type == "cuda":
        rest = torch.cuda.max_memory_reserved(model.device) - stored - sum(known.values())
        known["activation_bytes"] = max(rest, 0)
    return {
        **known,
        "bytes_per_step": weights.linear_bytes + cache,
        "flops_per_step": 2.0 * weights.linear_parameters * workload.batch,
    }
