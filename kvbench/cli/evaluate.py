"""``kvbench eval``: the grid of models, methods and tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.cli.options import (
    Address,
    Batch,
    DataRoot,
    Device,
    Dtype,
    Executor,
    GpusPerWorker,
    Limit,
    MaxNewTokens,
    Methods,
    Models,
    Protocol,
    Run,
    Seed,
    Statistics,
    Tasks,
    Workers,
)
from kvbench.cli.resume import run_resumable

if TYPE_CHECKING:
    from kvbench.evaluation.request import EvalRequest


def evaluate(
    methods: Methods = "all",
    models: Models = "smol_llava",
    tasks: Tasks = "all",
    protocol: Protocol = "quantized_prefill",
    limit: Limit = None,
    seed: Seed = 0,
    out: Run = None,
    data_root: DataRoot = None,
    batch: Batch = 1,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    workers: Workers = None,
    executor: Executor = "local",
    address: Address = None,
    gpus_per_worker: GpusPerWorker = None,
    calibration: Statistics = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Samples to calibrate with where no folder is given.")
    ] = 32,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Answer nothing; say how long, from the samples in --out."),
    ] = False,
) -> None:
    """Answer the tasks with every method and print accuracy, bits and bytes side by side."""
    from kvbench import api
    from kvbench.evaluation.store import SAMPLES

    asked: dict[str, Any] = {
        "protocol": protocol,
        "tasks": tasks,
        "models": models,
        "methods": methods,
        "out": out or api.new_run(),
        "data_root": data_root,
        "limit": limit,
        "seed": seed,
        "batch": batch,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "dtype": dtype,
        "workers": workers,
        "executor": executor,
        "address": address,
        "gpus_per_worker": gpus_per_worker,
        "calibration": calibration,
        "calibration_samples": calibration_samples,
    }
    if estimate:
        _estimate(api.evaluation_request(**asked))
    else:
        run_resumable(asked["out"], SAMPLES, lambda told: api.evaluate(**asked, progress=told))


def _estimate(request: EvalRequest) -> None:
    from kvbench.evaluation.estimate import estimate_text, estimates
    from kvbench.evaluation.samples import read_cell
    from kvbench.evaluation.store import SAMPLES, read_rows

    rows = read_rows(request.out / SAMPLES)
    cells = {
        name: read_cell(name, request.data_root, request.limit, request.seed)
        for name in request.tasks
    }
    typer.echo(estimate_text(estimates(request, cells, rows), request.workers or 1))
