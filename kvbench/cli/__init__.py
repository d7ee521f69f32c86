"""The command line: one small file a verb. Heavy imports happen inside the verbs."""

from __future__ import annotations

from typing import Annotated

import typer

import kvbench
from kvbench.cli import (
    ablate,
    analyze,
    bench,
    calibrate,
    compare,
    data,
    doctor,
    efficiency,
    evaluate,
    listing,
    lm_eval,
    match,
    new,
    perplexity,
    report,
    tune,
)
from kvbench.cli.verbs import Verbs

__all__ = ["app"]

app = typer.Typer(
    name="kvbench",
    cls=Verbs,
    help="What KV-cache quantization costs in accuracy and gives back in memory and speed.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # brackets are part of a method's name, not markup
    pretty_exceptions_enable=False,
)
app.command("eval")(evaluate.evaluate)
app.command("perplexity")(perplexity.perplexity)
app.command("lm-eval")(lm_eval.lm_eval)
app.command("efficiency")(efficiency.efficiency)
app.command("analyze")(analyze.analyze)
app.command("ablate")(ablate.ablate)
app.command("match")(match.match)
app.command("tune")(tune.tune)
app.command("report")(report.report)
app.command("calibrate")(calibrate.calibrate)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.command("list")(listing.listing)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(new.app, name="new")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvbench {kvbench.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
