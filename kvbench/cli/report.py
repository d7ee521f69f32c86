"""``kvbench report``: tables from result rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder that kvbench eval or kvbench efficiency wrote."),
    ],
) -> None:
    """Print the table of a finished or unfinished run, and write it as Markdown, CSV, figures."""
    show(directory)


def show(directory: Path) -> None:
    """Write the tables of `directory`, print the summary and where the tables are."""
    from kvbench.report import print_summary, read_results, write_report

    paths = write_report(directory)
    written = {path.name for path in paths}
    if "table2.md" in written:
        rows, run = read_results(directory)
        print_summary(rows, run)
    if "table4.md" in written:
        show_efficiency(directory)
    for path in paths:
        typer.echo(str(path))


def show_efficiency(directory: Path) -> None:
    """Print the main figures of the efficiency rows in `directory`."""
    from kvbench.efficiency.rows import read_efficiency
    from kvbench.report import efficiency_text

    typer.echo(efficiency_text(read_efficiency(directory)))
