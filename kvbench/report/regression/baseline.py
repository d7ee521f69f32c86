"""The compact file of a baseline: gzipped JSON lines, one trimmed row a sample."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.store import SAMPLES, read_rows
from kvbench.evaluation.typed import check_types, fields_of, to_line
from kvbench.report.regression.outcomes import SCHEMA, Outcome, by_cell, outcome

SUFFIX = ".jsonl.gz"


def read_outcomes(path: Path) -> list[Outcome]:
    """Read a run's folder or a file that `save_baseline` wrote.

    Raises:
        UserError: There is nothing of the kind, it is empty or broken, or a sample is there twice.
    """
    if path.is_dir():
        found = [outcome(row) for row in read_rows(path / SAMPLES)]
    elif path.is_file():
        found = _read_file(path)
    else:
        raise UserError(
            f"{path} does not exist: name a folder that kvbench eval wrote, or a baseline file"
        )
    if not found:
        raise UserError(f"{path} has no results: there is nothing to compare")
    by_cell(found, str(path))
    return found


def save_baseline(outcomes: Iterable[Outcome], path: Path) -> None:
    """Write outcomes as a baseline file, the same bytes whatever their order.

    Raises:
        UserError: The name doesn't end in ``.jsonl.gz``, or the file can't be written.
    """
    if not path.name.endswith(SUFFIX):
        raise UserError(f"{path} is no name for a baseline: end it in {SUFFIX}")
    ordered = sorted(outcomes, key=lambda one: (*dataclasses.astuple(one.cell), one.sample_id))
    text = "".join(to_line(one) + "\n" for one in ordered)
    # Without a time stamp: the file changes only when its content does.
    with suppress(OSError):  # what is wrong, if anything, shows in the next line
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, gzip.compress(text.encode("utf-8"), mtime=0))


def _read_file(path: Path) -> list[Outcome]:
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"can't read {path} ({error}): name a file that kvbench compare --save wrote"
        ) from error
    outcomes = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            one = Outcome(**fields_of(line, Outcome, SCHEMA))
            check_types(one)
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        outcomes.append(one)
    return outcomes
