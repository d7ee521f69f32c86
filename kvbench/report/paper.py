"""The paper's Table II: its values, and the order and labels that every table here follows.

``results/paper/table2.csv`` is the only place where they're written down.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

_TEXT_COLUMNS = ("model", "model_label", "method", "method_label", "bits", "suspect", "note")


@dataclass(frozen=True)
class PaperTable:
    """Accuracies that the paper reports, in percent, keyed by (model, method, task)."""

    models: Mapping[str, str]
    """Names here to the paper's labels, in the paper's order; so are `methods` and `tasks`."""
    methods: Mapping[str, str]
    tasks: Mapping[str, str]
    values: Mapping[tuple[str, str, str], float]
    suspect: Mapping[tuple[str, str, str], str]
    """Cells that look like copy errors, each with the reason: not to be compared with."""


@functools.cache
def paper_table() -> PaperTable:
    """Read the table that comes with the package."""
    source = resources.files("kvbench.results.paper").joinpath("table2.csv")
    lines = list(csv.DictReader(source.read_text(encoding="utf-8").splitlines()))
    tasks = [name for name in lines[0] if name not in _TEXT_COLUMNS]
    cells = [
        (line, task, (line["model"], line["method"], task)) for line in lines for task in tasks
    ]
    return PaperTable(
        models={line["model"]: line["model_label"] for line in lines},
        methods={line["method"]: line["method_label"] for line in lines},
        tasks={task: task.upper() for task in tasks},
        values={key: float(line[task]) for line, task, key in cells},
        suspect={key: line["note"] for line, task, key in cells if task in line["suspect"].split()},
    )


def rank(names: Mapping[str, str], name: str) -> tuple[int, str]:
    """Return a sort key: the paper's names in its order, then all others by name."""
    known = list(names)
    return (known.index(name) if name in names else len(known), name)


def label(names: Mapping[str, str], name: str) -> str:
    """Return the paper's label of a name, with the parameters of a spec kept; else the name."""
    base, bracket, parameters = name.partition("[")
    return f"{names[base]} {bracket}{parameters}".rstrip() if base in names else name
