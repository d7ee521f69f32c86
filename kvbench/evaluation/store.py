"""The result rows of an evaluation, one a sample, and what it takes to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.lines import Kind, Lines
from kvbench.evaluation.rows import SampleRow

SAMPLES = "samples.jsonl"
RUN = "run.json"
_KIND = Kind(SAMPLES, "samples", SampleRow.from_json)


class Store(Lines[SampleRow]):
    """``samples.jsonl`` of one output folder, held by one process at a time.

    Rows with status ``oom`` or ``error`` from an earlier run count as missing.
    """

    def __init__(self, directory: Path) -> None:
        """Remember the folder. Nothing is read, made or locked before ``with``."""
        super().__init__(directory, _KIND)

    def write_run(self, document: Mapping[str, Any]) -> None:
        """Write ``run.json`` as `write_run` does."""
        write_run(self.directory, document)


def write_run(directory: Path, document: Mapping[str, Any]) -> None:
    """Write ``run.json`` atomically: the request, the environment, all that repeating it takes.

    Raises:
        UserError: The folder can't be written to.
    """
    text = json.dumps(document, indent=2, sort_keys=True, default=str)
    write_atomically(directory / RUN, text + "\n")


def read_rows(path: Path) -> list[SampleRow]:
    """Read a ``samples.jsonl`` without locking it, as `Store.rows` would return it.

    Raises:
        UserError: The file can't be read, or a line is broken.
    """
    return _KIND.read(path)
