"""Runs that can be stopped anywhere and go on when started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from kvbench.cli.progress import Terminal
from kvbench.cli.report import show
from kvbench.cli.verbs import INTERRUPTED
from kvbench.errors import Mistake


def run_resumable(
    out: Path,
    rows: str,
    work: Callable[[Terminal], object],
    show: Callable[[Path], object] = show,
) -> None:
    """Do the work behind a progress bar and show its tables; cut short, those of the rows so far.

    Args:
        out: The output folder.
        rows: Name of the file in it that the work appends to.
        work: The run.
        show: Writes the tables of `out` and prints them.
    """
    try:
        with Terminal() as progress:
            work(progress)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: the rows so far are in {out}; "
            f"the same command with --out {out} goes on from there",
            err=True,
        )
        if has_rows(out / rows):
            show(out)
        raise typer.Exit(INTERRUPTED) from None
    except Mistake:
        if has_rows(out / rows):
            show(out)
        raise
    show(out)


def has_rows(path: Path) -> bool:
    """Whether a run has appended anything to its file."""
    return path.is_file() and path.stat().st_size > 0
