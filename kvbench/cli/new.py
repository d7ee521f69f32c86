"""``kvbench new``: files to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.report import print_paths
from kvbench.cli.verbs import Verbs

app = typer.Typer(cls=Verbs, help="Write files to begin with.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def method(
    name: Annotated[str, typer.Argument(help="What --methods will call it, such as int4_window.")],
    package: Annotated[
        bool, typer.Option("--package", help="As a package of its own, outside of a checkout.")
    ] = False,
    folder: Annotated[
        Path, typer.Option(help="Root of the checkout; with --package, where its folder goes.")
    ] = Path(),
) -> None:
    """Write a method that works and a test that passes, and say how to run them."""
    from kvbench.skeletons import method_skeleton

    skeleton = method_skeleton(name, folder, package)
    skeleton.write()
    print_paths(skeleton.files)
    typer.echo("\nIt stores 4-bit numbers behind a window of exact tokens. Run it, then edit it:\n")
    for command in skeleton.commands:
        typer.echo(f"  {command}")
