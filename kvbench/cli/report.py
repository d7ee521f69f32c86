"""``kvbench report``: tables from result rows, and a page to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from kvbench.errors import UserError

_GOALS = "goals.md"


def report(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of rows of kvbench eval, efficiency, perplexity."
        ),
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Also write one self-contained page, for a browser without network."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            envvar="KVBENCH_DATA",
            help="Folder of the data, for questions and pictures in the page; minimile needs none.",
        ),
    ] = None,
) -> None:
    """Print the table of a finished or unfinished run, and write it as Markdown, CSV, figures."""
    show(directory)
    if html is not None:
        write_html(directory, html, data)
        typer.echo(str(html))


def show(directory: Path, goals: bool = False) -> None:
    """Write the tables of `directory`, print the summary and where the tables are.

    The efficiency preset's goals are held against the rows where `goals` says so, and where there
    is a figure for each.
    """
    from kvbench.report import print_summary, read_results, write_report

    paths = write_report(directory)
    written = {path.name for path in paths}
    if "table2.md" in written:
        rows, run = read_results(directory)
        print_summary(rows, run)
    if "table4.md" in written:
        paths += show_efficiency(directory, goals)
    if "perplexity.md" in written:
        show_perplexity(directory)
    if "lm_eval.md" in written:
        show_lm_eval(directory)
    print_paths(paths)


def print_paths(paths: Iterable[Path]) -> None:
    """Say where tables and figures are."""
    for path in paths:
        typer.echo(str(path))


def show_efficiency(directory: Path, goals: bool) -> list[Path]:
    """Print the main figures of the efficiency rows in `directory`; the goals' file, if any."""
    from kvbench.efficiency.preset import goals_table, has_all
    from kvbench.efficiency.rows import read_efficiency
    from kvbench.evaluation.files import write_atomically
    from kvbench.report import efficiency_text

    rows = read_efficiency(directory)
    typer.echo(efficiency_text(rows))
    if not goals and not has_all(rows):
        return []
    write_atomically(directory / _GOALS, goals_table(rows, "github") + "\n")
    typer.echo(f"{goals_table(rows)}\n")
    return [directory / _GOALS]


def show_perplexity(directory: Path) -> None:
    """Print the tables of the perplexity rows in `directory`."""
    from kvbench.report import perplexity_text, read_tables

    for table in read_tables(directory):
        typer.echo(perplexity_text(table))


def show_lm_eval(directory: Path) -> None:
    """Print the table of lm-eval's tasks in `directory`."""
    from kvbench.report import lm_eval_text

    typer.echo(lm_eval_text(directory))


def write_html(directory: Path, path: Path, data: Path | None) -> None:
    """Write the page of `directory`, with questions and pictures where the data can be had.

    Raises:
        UserError: The folder of the data is missing, or the page can't be written.
    """
    from kvbench.cli.questions import read_questions
    from kvbench.efficiency.rows import read_efficiency
    from kvbench.evaluation.store import SAMPLES
    from kvbench.report import read_results
    from kvbench.report.html import Content, file_hashes, write_page
    from kvbench.report.write import EFFICIENCY

    if data is not None and not data.is_dir():
        raise UserError(f"data folder {data} does not exist: check the path given with --data")
    rows, run = read_results(directory) if (directory / SAMPLES).exists() else ([], {})
    speeds = read_efficiency(directory) if (directory / EFFICIENCY).exists() else []
    questions, remarks = read_questions(rows, data)
    hashes = file_hashes(directory)
    write_page(path, Content(rows, run, speeds, questions, remarks, hashes))
