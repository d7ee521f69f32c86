"""The paper's Table IV: ``results/paper/table4.csv`` is the only place where it's written down."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

MODEL = "llava15_7b"
"""The model that the table is about (section IV-D)."""
GPU = "v100"


@dataclass(frozen=True)
class PaperRow:
    """What the paper reports of one method at its largest batch."""

    batch: int
    memory_gb: float
    throughput: float
    """Tokens a second."""


@functools.cache
def paper_efficiency() -> Mapping[str, PaperRow]:
    """Read the table that comes with the package: method -> row."""
    source = resources.files("kvbench.results.paper").joinpath("table4.csv")
    lines = csv.DictReader(source.read_text(encoding="utf-8").splitlines())
    return {
        line["method"]: PaperRow(
            int(line["batch_size"]), float(line["memory_gb"]), float(line["tokens_per_second"])
        )
        for line in lines
    }
