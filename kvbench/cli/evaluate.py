"""``kvbench eval``: the grid of models, methods and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Seed,
    Statistics,
    Workers,
)
from kvbench.cli.resume import new_folder, run_resumable

if TYPE_CHECKING:
    from kvbench.evaluation.request import EvalRequest


def evaluate(
    methods: Methods = "all",
    models: Models = "smol_llava",
    tasks: Annotated[str, typer.Option(help="all (MileBench's twelve), or names.")] = "all",
    protocol: Annotated[
        str, typer.Option(help="quantized_prefill, exact_prefill, both, or sparse_prefill.")
    ] = "quantized_prefill",
    limit: Limit = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; continues a run that is there already."),
    ] = None,
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
    from kvbench.evaluation import choices
    from kvbench.evaluation.request import EvalRequest

    request = EvalRequest(
        protocols=choices.choose_protocols(protocol),
        tasks=choices.choose_tasks(tasks),
        models=choices.choose_models(models),
        methods=choices.choose_methods(methods),
        out=out or new_folder(),
        data_root=data_root,
        limit=limit,
        seed=seed,
        batch=batch,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        workers=workers,
        executor=executor,
        address=address,
        gpus_per_worker=gpus_per_worker,
        calibration=calibration,
        calibration_samples=calibration_samples,
    )
    if estimate:
        _estimate(request)
        return

    from kvbench.evaluation.run import evaluate as run
    from kvbench.evaluation.store import SAMPLES

    run_resumable(request.out, SAMPLES, lambda progress: run(request, progress))


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
