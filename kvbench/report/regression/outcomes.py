"""What a comparison needs of a sample, and the samples of a run by cell."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.report.cells import never_read

SETTINGS = (
    "revision",
    "dtype",
    "prompt_style",
    "generation",
    "calibration",
    "batch",
    "version",
)
"""Fields that may differ between two runs that are compared; where they do, it is said."""

SCHEMA = 1
_HEX = 12
"""Digits kept of a hash."""


@dataclass(frozen=True)
class CellKey:
    """One cell of the tables."""

    model: str
    protocol: str
    method: str
    task: str


@dataclass(frozen=True)
class Outcome:
    """The part of a `SampleRow` that a later run is compared with; fields of the same names."""

    schema: int
    """Version of this layout."""
    model: str
    protocol: Literal["quantized_prefill", "exact_prefill", "sparse_prefill"]
    method: str
    task: str
    sample_id: int
    dataset: str
    task_version: int
    prompt: str
    """First digits of the prompt's SHA-256; so of the images'."""
    images: str
    status: Literal["ok", "oom", "error"]
    correct: bool | None
    """None where the sample has no score: it failed, or the quantized cache was never read."""
    bits_per_element: float | None
    cache_bytes: int | None
    """Only of packed storage."""
    kl_mean: float | None
    revision: str
    dtype: str
    prompt_style: str
    generation: str
    """Canonical JSON."""
    calibration: str
    batch: int
    version: str

    @property
    def cell(self) -> CellKey:
        """Where the sample belongs."""
        return CellKey(self.model, self.protocol, self.method, self.task)


def outcome(row: SampleRow) -> Outcome:
    """Trim a row."""
    return Outcome(
        schema=SCHEMA,
        model=row.model,
        protocol=row.protocol,  # type: ignore[arg-type]
        method=row.method,
        task=row.task,
        sample_id=row.sample_id,
        dataset=row.dataset,
        task_version=row.task_version,
        prompt=row.prompt_sha256[:_HEX],
        images=row.images_sha256[:_HEX],
        status=row.status,  # type: ignore[arg-type]
        correct=None if never_read(row) else row.correct,
        bits_per_element=row.bits_per_element,
        cache_bytes=row.cache_bytes if row.storage == "packed" else None,
        kl_mean=row.kl_mean,
        revision=row.revision,
        dtype=row.dtype,
        prompt_style=row.prompt_style,
        generation=json.dumps(row.generation, sort_keys=True),
        calibration=row.calibration,
        batch=row.batch,
        version=row.version,
    )


Cells = Mapping[CellKey, Mapping[int, Outcome]]


def by_cell(outcomes: Iterable[Outcome], where: str) -> Cells:
    """Group outcomes by cell and sample.

    Args:
        outcomes: In any order.
        where: What to call their source in messages.

    Raises:
        UserError: A sample has two results, say of two versions in one folder.
    """
    cells: dict[CellKey, dict[int, Outcome]] = defaultdict(dict)
    for one in outcomes:
        other = cells[one.cell].setdefault(one.sample_id, one)
        if other is not one:
            raise UserError(
                f"{where} has two results of {one.method}, {one.protocol}, {one.task}, sample "
                f"{one.sample_id} ({_difference(other, one)}): compare runs that have one each"
            )
    return cells


def _difference(one: Outcome, other: Outcome) -> str:
    names = ("dataset", "task_version", "prompt", "images", "status", *SETTINGS)
    found = [
        f"{name} {getattr(one, name)} and {getattr(other, name)}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    ]
    return ", ".join(found) or "the same twice"
