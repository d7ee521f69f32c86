"""kvbench's own engine: allocate, run every shape once, then the whole workload on the clock."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvbench.cache.quantized import BoundMethod
from kvbench.efficiency.clock import Clock
from kvbench.efficiency.engine import Engine, StaticEngine, make_engine
from kvbench.efficiency.prompts import micro_batches
from kvbench.efficiency.request import PROBE_STEPS, TrialRequest, TrialResult
from kvbench.efficiency.shapes import Weights, weights_of
from kvbench.efficiency.workload import Workload, cache_layout


def run_engine(request: TrialRequest, bound: BoundMethod) -> TrialResult:
    """Run a method bound to a model on its device; the model's weights are changed for good.

    Raises:
        OutOfMemoryError: Also where `TrialRequest.steady` takes it for one.
    """
    model, weights = bound.model, weights_of(bound.model)
    before = _reserved(model.device)
    engine = make_engine(model, bound, request.workload)
    added = _reserved(model.device) - before
    if request.probe:
        _probe(request, engine, bound)
        return TrialResult("ok", path=engine.path, cache_bytes=engine.cache_nbytes)
    times = _generate(request, engine, bound)
    cache = engine.cache_nbytes
    workspace = max(added - cache, 0) if isinstance(engine, StaticEngine) else 0
    known: dict[str, Any] = {
        "weight_bytes": weights.language_bytes,
        "vision_bytes": weights.vision_bytes,
        "workspace_bytes": workspace,
    }
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        known["activation_bytes"] = max(peak - sum(known.values()) - cache, 0)
    return TrialResult(
        "ok",
        path=engine.path,
        cache_bytes=cache,
        packed_tokens_read=engine.packed_tokens_read,
        **known,
        **times,
        **_work(bound, request.workload, weights),
    )


def _probe(request: TrialRequest, engine: Engine, bound: BoundMethod) -> None:
    """Take a few steps after as few prompts as show how much memory all of them take.

    A static cache has its memory from the start, so one micro-batch will do.
    """
    prompts = micro_batches(bound.model, request.workload, request.prefill_rows, request.seed)
    for first_row, some in prompts:
        engine.prefill(first_row, some)
        if isinstance(engine, StaticEngine):
            break
    for _ in range(min(PROBE_STEPS, request.workload.output_tokens - 1)):
        engine.decode()
    _synchronize(bound.model.device)


def _generate(request: TrialRequest, engine: Engine, bound: BoundMethod) -> dict[str, Any]:
    """Run all; a result's times, by name.

    Raises:
        OutOfMemoryError: See `TrialRequest.steady`.
    """
    workload, clock = request.workload, Clock(bound.model.device)
    prompts = micro_batches(bound.model, workload, request.prefill_rows, request.seed)
    _compile_rest(request, engine, bound)
    retries, batches = _retries(bound.model.device), 0
    clock.start()
    for first_row, some in prompts:
        engine.prefill(first_row, some)
        clock.mark()
        batches += 1
        del some  # the next are made in the same memory
    for _ in range(workload.output_tokens - 1):
        engine.decode()
        clock.mark()
    times = clock.times(batches)
    steady = request.steady and isinstance(engine, StaticEngine)
    if steady and _retries(bound.model.device) > retries:
        raise torch.OutOfMemoryError("prompts ran, but torch had to give cached memory back for it")
    return times


def _compile_rest(request: TrialRequest, engine: Engine, bound: BoundMethod) -> None:
    """Run all shapes once, so that no kernel is compiled or chosen while the clock runs."""
    _probe(request, engine, bound)
    engine.forget()
    last = request.workload.batch % request.prefill_rows
    if last and isinstance(engine, StaticEngine):  # others take all prompts at once
        fewer = replace(request.workload, batch=last)
        for first_row, some in micro_batches(bound.model, fewer, last, request.seed):
            engine.prefill(first_row, some)
        engine.forget()


def _work(bound: BoundMethod, workload: Workload, weights: Weights) -> dict[str, Any]:
    """What a mean decode step must read and multiply, from shapes alone."""
    layout = cache_layout(bound.quantizers, bound.specs, workload, bound.model.dtype.itemsize)
    held = range(workload.input_tokens + 1, workload.cached_tokens + 1)
    read = sum(layout.read_nbytes(tokens) for tokens in held) / max(len(held), 1)
    embeddings: int = bound.model.get_input_embeddings().weight.nbytes  # type: ignore[assignment]
    return {
        "bytes_per_step": weights.language_bytes - embeddings + workload.batch * read,
        "flops_per_step": 2.0 * weights.linear_parameters * workload.batch,
    }


def _retries(device: torch.device) -> int:
    """How often torch gave cached memory back to the device, to ask again for another block."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"])


def _reserved(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
