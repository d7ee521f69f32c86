"""Turning an output folder's rows into its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.rows import LM_EVAL, SampleRow
from kvbench.evaluation.store import RUN, SAMPLES, read_rows
from kvbench.report.board import build
from kvbench.report.comparison import comparable, paper_csv, paper_markdown
from kvbench.report.details import details_csv, details_markdown
from kvbench.report.efficiency_tables import table4_csv, table4_markdown
from kvbench.report.lm_eval import write_lm_eval
from kvbench.report.table2 import table2_csv, table2_markdown

if TYPE_CHECKING:
    from kvbench.efficiency.rows import EfficiencyRow
    from kvbench.report.perplexity import PerplexityTable

EFFICIENCY = "efficiency.jsonl"
"""What ``kvbench efficiency`` writes; its reader is imported where there is such a file."""
PERPLEXITY = "perplexity.jsonl"
"""What ``kvbench perplexity`` writes."""


def read_results(directory: Path) -> tuple[list[SampleRow], dict[str, Any]]:
    """Return the rows of an output folder and the content of its ``run.json`` ({} without one).

    Raises:
        UserError: The folder has no rows, or one of the files is broken.
    """
    rows = read_rows(directory / SAMPLES)
    if not rows:
        raise UserError(
            f"{directory / SAMPLES} has no results yet: run kvbench eval --out {directory}"
        )
    return rows, read_run(directory)


def write_report(directory: Path) -> list[Path]:
    """Write the tables of an output folder into it, from its rows and ``run.json`` alone.

    From ``samples.jsonl`` come ``table2.md|csv``, ``details.md|csv`` and, for models and data of
    the paper, ``paper.md|csv``; from ``efficiency.jsonl`` what `write_efficiency` writes; from
    ``perplexity.jsonl`` ``perplexity.md|csv``; from ``lm_eval.json`` ``lm_eval.md|csv``. The rows
    may be those of an unfinished run.

    Returns:
        The files written.

    Raises:
        UserError: The folder has no rows or can't be written to, or one of the files is broken.
    """
    written: list[Path] = []
    others = [name for name in (EFFICIENCY, PERPLEXITY, LM_EVAL) if (directory / name).exists()]
    if (directory / SAMPLES).exists() or not others:
        written += _write_accuracy(directory)
    if EFFICIENCY in others:
        written += write_efficiency(directory, _efficiency_rows(directory))
    if PERPLEXITY in others:
        written += _write_perplexity(directory)
    if LM_EVAL in others:
        written += write_lm_eval(directory)
    return written


def write_efficiency(directory: Path, rows: Sequence[EfficiencyRow]) -> list[Path]:
    """Write ``table4.md|csv`` and the figures of memory and throughput, from efficiency rows.

    Returns:
        The files written.

    Raises:
        UserError: The folder can't be written to.
    """
    from kvbench.report.efficiency_figures import write_figures

    texts = {"table4.md": table4_markdown(rows), "table4.csv": table4_csv(rows)}
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [*(directory / name for name in texts), *write_figures(directory, rows)]


def _efficiency_rows(directory: Path) -> list[EfficiencyRow]:
    from kvbench.efficiency.rows import read_efficiency

    rows = read_efficiency(directory)
    if not rows:
        raise UserError(
            f"{directory / EFFICIENCY} has no results yet: run kvbench efficiency --out {directory}"
        )
    return rows


def _write_perplexity(directory: Path) -> list[Path]:
    from kvbench.report.perplexity import perplexity_csv, perplexity_markdown

    tables = read_tables(directory)
    texts = {
        "perplexity.md": perplexity_markdown(tables, read_run(directory)),
        "perplexity.csv": perplexity_csv(tables),
    }
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [directory / name for name in texts]


def read_tables(directory: Path) -> list[PerplexityTable]:
    """The tables of a folder that ``kvbench perplexity`` wrote.

    Raises:
        UserError: The folder has no rows, or a line is broken.
    """
    from kvbench.perplexity.rows import read_perplexity
    from kvbench.report.perplexity import build_tables

    rows = read_perplexity(directory)
    if not rows:
        raise UserError(
            f"{directory / PERPLEXITY} has no results yet: run kvbench perplexity --out {directory}"
        )
    return build_tables(rows)


def _write_accuracy(directory: Path) -> list[Path]:
    rows, run = read_results(directory)
    board = build(rows, run)
    texts = {
        "table2.md": table2_markdown(board),
        "table2.csv": table2_csv(board),
        "details.md": details_markdown(board),
        "details.csv": details_csv(board),
    }
    if comparable(board):
        texts |= {"paper.md": paper_markdown(board), "paper.csv": paper_csv(board)}
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [directory / name for name in texts]


def read_run(directory: Path) -> dict[str, Any]:
    """The content of a folder's ``run.json``; {} without one.

    Raises:
        UserError: It is broken.
    """
    path = directory / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path} ({error}): delete it to report without it") from error
    if not isinstance(run, dict):
        raise UserError(f"{path} is no JSON object: delete it to report without it")
    return run
