"""A CSV table by its columns."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvbench.errors import UserError

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Lines of a table; `columns["layer"]` are numbers, NaN where a cell is empty."""

    lines: Sequence[dict[str, str]]

    def __getitem__(self, name: str) -> Numbers:
        """A column as numbers."""
        return np.array([float(line[name] or "nan") for line in self.lines])

    def texts(self, name: str) -> list[str]:
        """A column as it is written."""
        return [line[name] for line in self.lines]

    def distinct(self, name: str) -> list[str]:
        """A column's different texts in order of appearance."""
        return list(dict.fromkeys(self.texts(name)))

    def where(self, name: str, text: str) -> Columns:
        """The lines with this text in a column."""
        return Columns([line for line in self.lines if line[name] == text])


def read_columns(path: Path, verb: str = "analyze") -> Columns:
    """Read a CSV file with a header that `kvbench VERB` wrote.

    Raises:
        UserError: it can't be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return Columns(list(csv.DictReader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"can't read {path} ({error}): run kvbench {verb} again") from error
