"""``kvbench eval``: the grid of models, methods and tasks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.options import (
    Batch,
    DataRoot,
    Device,
    Dtype,
    Limit,
    MaxNewTokens,
    Methods,
    Models,
    Seed,
    Statistics,
    Workers,
)
from kvbench.cli.progress import Terminal
from kvbench.cli.report import show
from kvbench.cli.verbs import INTERRUPTED

if TYPE_CHECKING:
    from kvbench.evaluation.request import EvalRequest

_RUNS = Path("results/runs")


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
    workers: Workers = 1,
    calibration: Statistics = None,
    calibration_samples: Annotated[
        int, typer.Option(help="Samples to calibrate with where no folder is given.")
    ] = 32,
) -> None:
    """Answer the tasks with every method and print accuracy, bits and bytes side by side."""
    from kvbench.evaluation import choices
    from kvbench.evaluation.request import EvalRequest

    request = EvalRequest(
        protocols=choices.choose_protocols(protocol),
        tasks=choices.choose_tasks(tasks),
        models=choices.choose_models(models),
        methods=choices.choose_methods(methods),
        out=out or _RUNS / time.strftime("%Y%m%d-%H%M%S"),
        data_root=data_root,
        limit=limit,
        seed=seed,
        batch=batch,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        workers=workers,
        calibration=calibration,
        calibration_samples=calibration_samples,
    )
    _run(request)


def _run(request: EvalRequest) -> None:
    from kvbench.evaluation.run import evaluate as run

    try:
        with Terminal() as progress:
            run(request, progress)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: the rows so far are in {request.out}; "
            f"the same command with --out {request.out} goes on from there",
            err=True,
        )
        if _has_rows(request.out):
            show(request.out)
        raise typer.Exit(INTERRUPTED) from None
    show(request.out)


def _has_rows(directory: Path) -> bool:
    from kvbench.evaluation.store import SAMPLES

    rows = directory / SAMPLES
    return rows.is_file() and rows.stat().st_size > 0
