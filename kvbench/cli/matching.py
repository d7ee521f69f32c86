"""Settings of the same size, found and compared behind a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from kvbench.cli.progress import Terminal

if TYPE_CHECKING:
    from kvbench.matching.request import MatchRequest


def run_match(request: MatchRequest, plan: bool) -> None:
    """Print the settings; unless only the plan is wanted, compare them and show the tables."""
    from kvbench.matching.run import compare, match
    from kvbench.report.matched import matched_plan, matched_summary, write_matched

    out = request.evaluation.out
    with Terminal() as progress:
        found = match(request, progress)
        typer.echo(matched_plan(out))
        if plan:
            return
        compare(request, found, progress)
    paths = write_matched(out)
    typer.echo(matched_summary(out))
    for path in paths:
        typer.echo(str(path))
