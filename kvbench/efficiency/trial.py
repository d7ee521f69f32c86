"""One try in this process: load, allocate, generate, measure.

`python -m kvbench.efficiency.trial REQUEST.json RESULT.json` runs one; whatever ends it early, the
caller finds out from the missing result.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.contract import Calibration
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.observers import decoder_stack
from kvbench.cache.quantized import BoundMethod, bind, resolve
from kvbench.cache.specs import layer_specs
from kvbench.cache.statistics import statistic_shape
from kvbench.efficiency.ceilings import copy_bandwidth, matmul_rate
from kvbench.efficiency.clock import Clock
from kvbench.efficiency.engine import Engine, StaticEngine, make_engine
from kvbench.efficiency.meters import peak_memory
from kvbench.efficiency.peers import run_generate
from kvbench.efficiency.prompts import micro_batches
from kvbench.efficiency.request import TrialRequest, TrialResult
from kvbench.efficiency.workload import Workload, cache_layout
from kvbench.errors import UserError

PROBE_STEPS = 3


def run_trial(request: TrialRequest) -> TrialResult:
    """Run a request; running out of memory is a result.

    Raises:
        UserError: there is no such model or method, or they don't go together.
    """
    try:
        return _run(request)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return TrialResult("oom", detail=str(error).splitlines()[0])
    except RuntimeError as error:
        if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return TrialResult("oom", detail=str(error).splitlines()[0])
        raise


def main(arguments: list[str]) -> int:
    """Run the request in a file and write the result to another."""
    # Segments that grow leave no holes: what fits is decided by bytes, not by their order.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    request, result = (Path(argument) for argument in arguments)
    try:
        outcome = run_trial(TrialRequest.load(request))
    except UserError as error:
        outcome = TrialResult("failed", detail=str(error))
    outcome.save(result)
    return 0


def _run(request: TrialRequest) -> TrialResult:
    device, method = torch.device(request.device), resolve(request.method)
    with peak_memory(device, request.memory_limit) as peak:
        measured: dict[str, Any] = {}
        if device.type == "cuda" and not request.probe:
            measured["copy_bandwidth"] = copy_bandwidth(device)
            measured["matmul_rate"] = matmul_rate(device, getattr(torch, request.dtype))
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        model, entry, weights = load_model(request)
        if request.runner == "generate":
            result = run_generate(request, model, method)
        else:
            result = _run_engine(request, bound_method(request, model, entry, method))
    return replace(result, weights=weights, **measured, **peak.fields())


def load_model(request: TrialRequest) -> tuple[Any, Any, Any]:
    """The model, its entry, and whether its weights are real."""
    from kvbench.evaluation.hardware import load
    from kvbench.models.architectures import random_model
    from kvbench.models.find import find_model

    entry = find_model(request.model)
    try:
        return load(entry, request.device, request.dtype).model, entry, "real"
    except UserError:
        if entry.folder is not None:
            raise
        dtype = getattr(torch, request.dtype)
        return random_model(entry, request.device, dtype, request.seed), entry, "random"


def bound_method(request: TrialRequest, model: Any, entry: Any, method: Any) -> BoundMethod:
    """A quantizer made ready for a model, with made-up statistics if it needs any.

    Raises:
        UserError: the method is a peer, or can't store the model's layers.
    """
    if isinstance(method, ForeignCache):
        raise UserError(f"{method.label} brings its own cache; run it with `generate`.")
    return bind(
        model,
        method,
        protocol=request.protocol,
        calibration=_made_up(method.needs.statistics, model),
        text_salient_layers=entry.tsa_layers,
    )


def _made_up(names: tuple[str, ...], model: Any) -> Calibration | None:
    """Statistics that cost nothing: speed and memory don't depend on their values."""
    if not names:
        return None
    specs, source = layer_specs(model.config), torch.Generator().manual_seed(0)
    shapes = {name: statistic_shape(name, specs) for name in names}
    return Calibration(
        {name: torch.rand(shape, generator=source) + 0.5 for name, shape in shapes.items()}
    )


def _run_engine(request: TrialRequest, bound: BoundMethod) -> TrialResult:
    model, workload = bound.model, request.workload
    weights = _weight_bytes(model)
    before = _reserved(model.device)
    engine = make_engine(model, bound, workload)
    added = _reserved(model.device) - before
    if request.probe:
        _probe(request, engine, bound)
        return TrialResult("ok", path=engine.path, cache_bytes=engine.cache_nbytes)
    times = _generate(request, engine, bound)
    cache = engine.cache_nbytes
    workspace = max(added - cache, 0) if isinstance(engine, StaticEngine) else 0
    known: dict[str, Any] = {**weights, "workspace_bytes": workspace}
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
        **_work(bound, workload, weights["weight_bytes"], _linear_parameters(model)),
    )


def _probe(request: TrialRequest, engine: Engine, bound: BoundMethod) -> None:
    """Take a few steps after as few prompts as show how much memory all of them take.

    A static cache has its memory from the start, so one micro-batch will do.
    """
    done = 0
    prompts = micro_batches(bound.model, request.workload, request.prefill_rows, request.seed)
    for some in prompts:
        engine.prefill(done, some)
        done += len(some["input_ids"])
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
    retries = _retries(bound.model.device)
    clock.start()
    done = 0
    for some in prompts:
        engine.prefill(done, some)
        done += len(some["input_ids"])
        clock.mark()
        del some  # the next are made in the same memory
    for _ in range(workload.output_tokens - 1):
        engine.decode()
        clock.mark()
    total, spent = clock.since_start(), clock.between()
    steady = request.steady and isinstance(engine, StaticEngine)
    if steady and _retries(bound.model.device) > retries:
        raise torch.OutOfMemoryError("prompts ran, but torch had to give cached memory back for it")
    prompted = len(spent) - (workload.output_tokens - 1)
    prefill = sum(spent[:prompted])
    return {
        "ttft_s": prefill,
        "ttft_first_s": spent[0],
        "prefill_s": prefill,
        "decode_s": total - prefill,
        "total_s": total,
        "tpot_s": tuple(spent[prompted:]),
    }


def _compile_rest(request: TrialRequest, engine: Engine, bound: BoundMethod) -> None:
    """Run all shapes once, so that no kernel is compiled or chosen while the clock runs."""
    _probe(request, engine, bound)
    engine.forget()
    last = request.workload.batch % request.prefill_rows
    if last and isinstance(engine, StaticEngine):  # others take all prompts at once
        fewer = replace(request.workload, batch=last)
        for some in micro_batches(bound.model, fewer, last, request.seed):
            engine.prefill(0, some)
        engine.forget()


def _work(
    bound: BoundMethod, workload: Workload, weight_bytes: int, parameters: int
) -> dict[str, Any]:
    """What a mean decode step must read and multiply, from shapes alone."""
    layout = cache_layout(bound.quantizers, bound.specs, workload, bound.model.dtype.itemsize)
    held = range(workload.input_tokens + 1, workload.cached_tokens + 1)
    read = sum(layout.read_nbytes(tokens) for tokens in held) / max(len(held), 1)
    embeddings: int = bound.model.get_input_embeddings().weight.nbytes  # type: ignore[assignment]
    return {
        "bytes_per_step": weight_bytes - embeddings + workload.batch * read,
        "flops_per_step": 2.0 * parameters * workload.batch,
    }


def _linear_parameters(model: Any) -> int:
    """Numbers in the matrices that every token is multiplied with."""
    layers = [m for m in decoder_stack(model).layers.modules() if isinstance(m, nn.Linear)]
    head: int = model.get_output_embeddings().weight.numel()
    return head + sum(module.weight.numel() for module in layers)


def _weight_bytes(model: Any) -> dict[str, int]:
    """Bytes of the language model with its embeddings and head, and of the rest."""
    language = [decoder_stack(model), model.get_output_embeddings()]
    mine = _bytes({id(p): p for part in language for p in _tensors(part)}.values())
    return {"weight_bytes": mine, "vision_bytes": _bytes(_tensors(model)) - mine}


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
