"""``kvbench report``: tables from result rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder that kvbench eval wrote.")
    ],
) -> None:
    """Print the table of a finished or unfinished run, and write it as Markdown and CSV."""
    show(directory)


def show(directory: Path) -> None:
    """Write the tables of `directory`, print the summary and where the tables are."""
    from kvbench.report import print_summary, read_results, write_report

    paths = write_report(directory)
    rows, run = read_results(directory)
    print_summary(rows, run)
    for path in paths:
        typer.echo(str(path))
