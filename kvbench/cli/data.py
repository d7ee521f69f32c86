"""``kvbench data``: make the generated set, check any set in MileBench's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.errors import UserError

app = typer.Typer(
    rich_markup_mode=None, help="Make or check data in MileBench's layout.", no_args_is_help=True
)


@app.command()
def make(
    root: Annotated[Path, typer.Argument(help="Folder to fill; it must be empty or new.")],
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other samples.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each task.")] = 200,
) -> None:
    """Draw minimile: the twelve tasks with generated images, the same everywhere for a seed."""
    from kvbench.tasks import minimile

    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not an empty folder: choose a new one")
    minimile.make(root, seed=seed, samples=samples)
    typer.echo(f"{len(minimile.FOLDERS)} tasks of {samples} samples in {root}")


@app.command()
def check(root: Annotated[Path, typer.Argument(help="Folder with the tasks' folders.")]) -> None:
    """Report samples, images and faults of each task; exits with 1 if there is a fault."""
    from tabulate import tabulate

    from kvbench.tasks.milebench.check import check as check_root
    from kvbench.tasks.milebench.check import report_rows

    reports = check_root(root)
    typer.echo(tabulate(report_rows(reports), headers="keys"))
    for report in reports:
        for problem in report.problems:
            typer.echo(f"{report.task.name}: {problem}")
    if not all(report.ok for report in reports):
        raise typer.Exit(1)
