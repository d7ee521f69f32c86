"""``kvbench match``: every method at the same stored bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.matching import run_match
from kvbench.cli.options import (
    Batch,
    DataRoot,
    Device,
    Dtype,
    Limit,
    MaxNewTokens,
    Methods,
    Models,
    Protocol,
    Seed,
    Statistics,
    Tasks,
    Workers,
)


def match(
    bits: Annotated[
        str, typer.Option(help="Stored bits an element, metadata and exact tokens counted.")
    ] = "2.25,2.75,4.25",
    methods: Methods = "all",
    models: Models = "smol_llava",
    tasks: Tasks = "all",
    protocol: Protocol = "quantized_prefill",
    samples: Annotated[
        int, typer.Option(help="Prompts of these tasks to measure storage with.")
    ] = 12,
    plan: Annotated[bool, typer.Option("--plan", help="Only find the settings.")] = False,
    limit: Limit = None,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder of rows; settings that it holds already cost nothing.")
    ] = Path("results/runs/matched"),
    data_root: DataRoot = None,
    batch: Batch = 1,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    workers: Workers = 1,
    calibration: Statistics = None,
) -> None:
    """Set every method to the same stored bits and answer the tasks: what is best at a size."""
    from kvbench.api import evaluation_request
    from kvbench.matching.request import MatchRequest, read_budgets
    from kvbench.matching.tasks import OnTasks

    evaluation = evaluation_request(
        methods,
        models,
        tasks,
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
        calibration=calibration,
    )
    run_match(MatchRequest(OnTasks(evaluation, samples), read_budgets(bits)), plan)
