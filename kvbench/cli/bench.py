"""``kvbench bench``: what the kernels do on this GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.verbs import Verbs

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
