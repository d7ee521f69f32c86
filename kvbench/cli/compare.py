"""``kvbench compare``: a run against a baseline, for CI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.errors import UserError

WORSE = 1


def compare(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that kvbench eval wrote, or a baseline.")
    ],
    baseline: Annotated[
        Path | None,
        typer.Argument(metavar="BASELINE", help="Folder of an earlier run, or a saved baseline."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Save the run as a baseline, NAME.jsonl.gz, instead of comparing it."),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="Points of accuracy that a task or a mean may lose.")
    ] = 1.0,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Factor by which the KL divergence to fp16 may grow; not judged if none."
        ),
    ] = None,
    any_images: Annotated[
        bool, typer.Option("--any-images", help="Accept image files with other bytes.")
    ] = False,
    markdown: Annotated[
        Path | None, typer.Option(help="Also write it as Markdown, for a pull request.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write it as JUnit XML, for CI.")] = None,
) -> None:
    """Say what got worse, sample by sample; exits with 1 if anything did."""
    from kvbench import api
    from kvbench.report import regression

    if save is not None:
        if baseline is not None:
            raise UserError("give either a BASELINE to compare with or --save, not both")
        outcomes = regression.read_outcomes(run)
        regression.save_baseline(outcomes, save)
        typer.echo(f"{len(outcomes)} samples in {save}")
        return
    if baseline is None:
        raise UserError("nothing to compare with: give a BASELINE, or make one with --save")
    result = api.compare(run, baseline, max_drop=max_drop, max_kl=max_kl, any_images=any_images)
    typer.echo(regression.comparison_text(result), nl=False)
    _write(markdown, regression.comparison_markdown(result))
    _write(junit, regression.junit_xml(result))
    if not result.ok:
        raise typer.Exit(WORSE)


def _write(path: Path | None, text: str) -> None:
    from kvbench.evaluation.files import write_atomically

    if path is not None:
        write_atomically(path, text)
