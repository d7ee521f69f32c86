"""``kvbench ablate``: sweeps over methods' fields, AKVQ-VL's own by name."""

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
    Models,
    Protocol,
    Seed,
    Statistics,
    Workers,
)
from kvbench.cli.progress import Terminal
from kvbench.cli.report import print_paths
from kvbench.defaults import REFERENCE

if TYPE_CHECKING:
    from kvbench.analysis.sweeps import Sweep
    from kvbench.evaluation.request import EvalRequest

_PAPER_TASKS = "wqa,dqa"


def ablate(
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="table3, figure8, figure8a to figure8d, paper (all of them), or "
            'method.field=values such as "akvq_vl.recent=0,32,64,128"; may be repeated.'
        ),
    ] = None,
    models: Models = "smol_llava",
    tasks: Annotated[
        str | None,
        typer.Option(help="all, or names; without it the paper's, for other sweeps wqa and dqa."),
    ] = None,
    protocol: Protocol = "quantized_prefill",
    limit: Limit = None,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of rows; points that it holds already cost nothing.")
    ] = Path("results/runs/ablations"),
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
) -> None:
    """Answer the tasks along sweeps over a method's fields; tables and plots with intervals."""
    from kvbench.analysis.sweeps import choose_sweeps
    from kvbench.api import evaluation_request

    sweeps = choose_sweeps(sweep or ["paper"])
    request = evaluation_request(
        REFERENCE,
        models,
        tasks or _PAPER_TASKS,
        protocol=protocol,
        out=out,
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
    )
    _run(sweeps, request, tasks is not None)


def _run(sweeps: tuple[Sweep, ...], request: EvalRequest, keep_tasks: bool) -> None:
    from kvbench.analysis.ablate import ablate as run
    from kvbench.report.ablation import ablation_summary, write_ablation

    with Terminal() as progress:
        run(sweeps, request, keep_tasks, progress)
    paths = write_ablation(request.out)
    typer.echo(ablation_summary(request.out))
    print_paths(paths)
