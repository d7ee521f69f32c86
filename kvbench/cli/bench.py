"""``kvbench bench``: what the kernels do on this GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.options import Dtype, Methods
from kvbench.cli.verbs import Verbs
from kvbench.defaults import MEASURED

app = typer.Typer(cls=Verbs, help="Measure kernels on this GPU.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def kernels(
    out: Annotated[Path | None, typer.Option(help="Write all numbers here, as JSON.")] = None,
    quick: Annotated[bool, typer.Option(help="Only the first shape.")] = False,
) -> None:
    """Time decode attention and quantization against torch and the device's limits."""
    from kvbench.efficiency.bench import run, table

    result = run(quick)
    typer.echo(table(result))
    if out is not None:
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")


@app.command()
def tunings(
    shape: Annotated[str, typer.Option(help="Only shapes whose names contain this.")] = "",
) -> None:
    """Time decode attention in every launch of a grid: what this GPU likes best."""
    from kvbench.efficiency.span_sweep import sweep, table

    for timed in sweep(shape):
        typer.echo(table(timed) + "\n")


@app.command()
def step(
    model: Annotated[str, typer.Option(help="Name, or name=/folder.")] = "llava15_7b",
    methods: Methods = MEASURED,
    batch: Annotated[int, typer.Option(help="Rows.")] = 40,
    input_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 600,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 512,
    dtype: Dtype = "auto",
) -> None:
    """Show which kernels a decode step and a micro-batch of prompts spend their time in."""
    from kvbench.efficiency.step_profile import conditions, profile_step, step_requests, table

    requests = list(step_requests(model, methods, batch, input_tokens, output_tokens, dtype))
    typer.echo(conditions() + "\n")
    for request in requests:
        typer.echo(
            f"{request.model} · {request.method}: {input_tokens} tokens in, "
            f"{request.workload.vision_tokens} of them vision; step {output_tokens // 2} of "
            f"{output_tokens}\n"
        )
        typer.echo(table(profile_step(request)) + "\n")
