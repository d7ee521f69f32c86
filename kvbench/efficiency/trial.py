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

from kvbench.cache.contract import Calibration
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.quantized import BoundMethod, bind, resolve
from kvbench.cache.specs import layer_specs
from kvbench.cache.statistics import statistic_shape
from kvbench.efficiency.ceilings import copy_bandwidth, matmul_rate
from kvbench.efficiency.engine_run import run_engine
from kvbench.efficiency.meters import peak_memory
from kvbench.efficiency.peers import run_generate
from kvbench.efficiency.request import TrialRequest, TrialResult
from kvbench.errors import UserError


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
            result = run_engine(request, bound_method(request, model, entry, method))
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
