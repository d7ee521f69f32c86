"""The leaderboard on the terminal: a drawn table there, plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from tabulate import tabulate

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import Block, build
from kvbench.report.header import title
from kvbench.report.table2 import grid
from kvbench.report.text import plain


def print_summary(
    rows: Iterable[SampleRow],
    run: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> None:
    """Print one table for each model and protocol.

    Args:
        rows: Result rows, in any order.
        run: Content of ``run.json``, for the planned samples.
        stream: Where to; standard output if None.
    """
    stream = stream or sys.stdout
    for block in build(rows, run).blocks:
        if stream.isatty():
            _draw(block, stream)
        else:
            stream.write(summary_text(block))


def summary_text(block: Block) -> str:
    """Return a block's title and table as plain text."""
    headers, lines = grid(block)
    table = tabulate(
        [[plain(cell) for cell in line] for line in lines],
        headers=headers,
        tablefmt="simple",
        disable_numparse=True,
        colalign=["left"] + ["right"] * (len(headers) - 1),
    )
    return f"\n{_title(block)}\n\n{table}\n"


def _title(block: Block) -> str:
    return plain(f"{title(block)}, {block.setting.dataset}: accuracy in percent")


def _draw(block: Block, stream: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    headers, lines = grid(block)
    table = Table(title=Text(_title(block)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(headers):
        table.add_column(Text(plain(name)), justify="right" if index else "left")
    for line in lines:
        table.add_row(*(Text(plain(cell)) for cell in line))
    Console(file=stream).print(table)
