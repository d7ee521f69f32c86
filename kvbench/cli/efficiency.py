"""``kvbench efficiency``: memory, largest batch and throughput of every method."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbench.cli.options import Dtype, Models, Run
from kvbench.cli.report import show
from kvbench.cli.resume import has_rows, run_resumable
from kvbench.defaults import MEASURED


class Preset(StrEnum):
    """Sets of scenarios."""

    PAPER = "paper"


Gpu = Annotated[
    str, typer.Option(help="v100, a100_40, a100_80, h100, h200, rtx4090, or auto: this card.")
]
Methods = Annotated[
    str | None, typer.Option(help=f"all, or names with parameters; {MEASURED} if not given.")
]
Input = Annotated[int | None, typer.Option(help="Tokens of a prompt; 600 if not given.")]
Output = Annotated[int | None, typer.Option(help="Tokens of an answer; 512 if not given.")]
Vision = Annotated[
    int | None, typer.Option(help="Of the prompt; as many whole images as fit if not given.")
]
Batch = Annotated[
    str | None,
    typer.Option(help="Batches to measure, such as 8,64,largest; the largest if not given."),
]
Plan = Annotated[bool, typer.Option("--plan", help="Only print what the capacity model expects.")]
Named = Annotated[
    Preset | None, typer.Option(help="Measure a set of scenarios and print its goals.")
]
Prefill = Annotated[
    int | None, typer.Option(help="Prompts that the engine runs at once; by length if not given.")
]
Minutes = Annotated[float | None, typer.Option(help="Stop after them with what there is.")]


def efficiency(
    gpu: Gpu = "v100",
    models: Models = "llava15_7b",
    methods: Methods = None,
    input_tokens: Input = None,
    output_tokens: Output = None,
    vision_tokens: Vision = None,
    batch: Batch = None,
    out: Run = None,
    plan: Plan = False,
    preset: Named = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one try.")] = 600.0,
    minutes: Minutes = None,
    tolerance: Annotated[float, typer.Option(help="Share to find the largest batch to.")] = 0.01,
    prefill_rows: Prefill = None,
    seed: Annotated[int, typer.Option(help="Of random weights and prompts.")] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Measure memory and speed of methods in a static decode engine, each try in a new process.

    Without a GPU, or for one with more memory than there is, the capacity model answers.
    """
    from kvbench import api

    asked: dict[str, Any] = {
        "gpu": gpu,
        "models": models,
        "methods": methods,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "vision_tokens": vision_tokens,
        "batch": batch,
        "preset": preset,
        "dtype": dtype,
        "seed": seed,
        "prefill_rows": prefill_rows,
        "timeout": timeout,
        "minutes": minutes,
        "tolerance": tolerance,
    }
    if plan:
        from kvbench.efficiency.plan import expected

        typer.echo(expected(*api.efficiency_request(**asked)))
    else:
        _run(out or api.new_run(), asked)


def _run(out: Path, asked: dict[str, Any]) -> None:
    from kvbench import api
    from kvbench.efficiency.rows import ROWS

    def tables(out: Path) -> None:
        if has_rows(out / ROWS):  # the minutes may have been over before the first
            show(out, goals=asked["preset"] is not None)

    run_resumable(
        out, ROWS, lambda told: api.measure_efficiency(**asked, out=out, progress=told), tables
    )
