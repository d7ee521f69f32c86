"""Settings of the same size, found and compared by a run that can be stopped anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvbench.cli.progress import Terminal
from kvbench.cli.report import print_paths
from kvbench.cli.resume import run_resumable

if TYPE_CHECKING:
    from kvbench.matching.request import MatchRequest


def run_match(request: MatchRequest, plan: bool) -> None:
    """Print the settings; unless only the plan is wanted, compare them and show the tables."""
    from kvbench.matching.run import compare, match
    from kvbench.report.matched import matched_plan

    evaluation = request.evaluation

    def work(progress: Terminal) -> None:
        found = match(request, progress)
        typer.echo(matched_plan(evaluation.out))
        if not plan:
            compare(request, found, progress)

    run_resumable(evaluation.out, evaluation.rows, work, _nothing if plan else _show)


def _show(out: Path) -> None:
    """Write and print the tables, if settings were found."""
    from kvbench.report.matched import MATCHED, matched_summary, write_matched

    if (out / MATCHED).exists():
        paths = write_matched(out)
        typer.echo(matched_summary(out))
        print_paths(paths)


def _nothing(out: Path) -> None:
    """A plan has no tables."""
