"""One cell of a table: what one method scored on one task, or over all tasks, from rows alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kvbench.defaults import REFERENCE
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.statistics import (
    Estimate,
    Interval,
    Paired,
    bootstrap_accuracy,
    bootstrap_difference,
    detectable_difference,
    mcnemar,
    mean_of_items,
    pair,
    wilson,
)


@dataclass(frozen=True)
class Comparison:
    """A method against the 16-bit cache on the same samples; shares from -1 to 1."""

    counts: Paired
    difference: float
    interval: Interval
    p: float
    detectable: float | None
    """Smallest difference that this many samples with this many flips would show; 80 % power."""


@dataclass(frozen=True)
class Cell:
    """Accuracy and its company. Shares are 0 to 1; None where no sample says anything."""

    n: int
    """Samples with a score."""
    expected: int
    right: int
    accuracy: float | None = None
    interval: Interval | None = None
    strict: float | None = None
    empty: float | None = None
    unparsable: float | None = None
    comparison: Comparison | None = None
    agreement: float | None = None
    kl_first: Estimate | None = None
    kl_mean: Estimate | None = None
    bits: float | None = None
    cache_bytes: float | None = None
    tokens_read: float | None = None
    oom: int = 0
    errors: int = 0
    not_read: int = 0
    """Answers that never read a quantized cache, so they say nothing about the method."""
    mixed: bool = False
    """Rows of different prompts or images for one sample, or of two calibrations: no score."""
    batches: tuple[int, ...] = ()
    storages: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every expected sample has a score."""
        return self.n >= self.expected


def never_read(row: SampleRow) -> bool:
    """Say whether an answer of a packing method came without reading its packed cache."""
    packs = row.storage == "packed" and row.method.partition("[")[0] != REFERENCE
    return packs and row.status == "ok" and not row.packed_tokens_read


def make_cell(rows: Sequence[SampleRow], baseline: Mapping[int, SampleRow], expected: int) -> Cell:
    """Build the cell of one method and task.

    Args:
        rows: All rows of the method and task; a sample may occur more than once.
        baseline: The scored rows of the 16-bit cache on the same task, by sample; empty if none.
        expected: Samples that the task should have.
    """
    chosen = choose(rows)
    scored = scored_rows(rows)
    mixed = is_mixed(rows)
    right = sum(bool(row.correct) for row in scored)
    return Cell(
        n=len(scored),
        expected=expected,
        right=right,
        accuracy=right / len(scored) if scored else None,
        interval=wilson(right, len(scored)) if scored else None,
        strict=_share(row.strict for row in scored),
        empty=_share(row.empty for row in scored),
        unparsable=_share(row.unparsable for row in scored),
        comparison=_compare(scored, baseline),
        agreement=_share(_agrees(row, baseline) for row in scored),
        kl_first=_estimate(row.kl_first for row in scored),
        kl_mean=_estimate(row.kl_mean for row in scored),
        bits=_mean(row.bits_per_element for row in scored),
        cache_bytes=_mean(row.cache_bytes for row in scored if row.storage == "packed"),
        tokens_read=_mean(row.packed_tokens_read for row in scored),
        oom=sum(row.status == "oom" for row in chosen),
        errors=sum(row.status == "error" for row in chosen),
        not_read=0 if mixed else sum(never_read(row) for row in chosen),
        mixed=mixed,
        batches=tuple(sorted({row.batch for row in chosen})),
        storages=tuple(sorted({row.storage for row in chosen})),
    )


def choose(rows: Iterable[SampleRow]) -> list[SampleRow]:
    """Return one row a sample, by sample: an answered one first, then the smallest batch's."""
    best: dict[int, SampleRow] = {}
    for row in sorted(rows, key=lambda row: (row.status != "ok", row.batch, row.key)):
        best.setdefault(row.sample_id, row)
    return [best[sample] for sample in sorted(best)]


def scored_rows(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Return the rows that count: one a sample, answered, with the quantized cache read."""
    if is_mixed(rows):
        return []
    return [row for row in choose(rows) if row.status == "ok" and not never_read(row)]


def is_mixed(rows: Sequence[SampleRow]) -> bool:
    """Say whether a sample had different prompts or images, or the rows different calibrations."""
    if len({row.calibration for row in rows}) > 1:
        return True
    asked: dict[int, tuple[str, str]] = {}
    return any(asked.setdefault(row.sample_id, _question(row)) != _question(row) for row in rows)


def over_tasks(cells: Sequence[Cell]) -> Cell:
    """Average a method's cells, every task weighing the same; counts add up.

    Standard errors combine as those of independent means. Samples that were lost and gained are
    pooled for McNemar's test.
    """
    scored = [cell for cell in cells if cell.n]
    return Cell(
        n=sum(cell.n for cell in cells),
        expected=sum(cell.expected for cell in cells),
        right=sum(cell.right for cell in cells),
        accuracy=_mean(cell.accuracy for cell in scored),
        interval=bootstrap_accuracy([(cell.right, cell.n) for cell in scored]) if scored else None,
        strict=_mean(cell.strict for cell in scored),
        empty=_mean(cell.empty for cell in scored),
        unparsable=_mean(cell.unparsable for cell in scored),
        comparison=_summarise([cell.comparison.counts for cell in scored if cell.comparison]),
        agreement=_mean(cell.agreement for cell in scored),
        kl_first=_combine([cell.kl_first for cell in scored if cell.kl_first]),
        kl_mean=_combine([cell.kl_mean for cell in scored if cell.kl_mean]),
        bits=_mean(cell.bits for cell in scored),
        cache_bytes=_mean(cell.cache_bytes for cell in scored),
        tokens_read=_mean(cell.tokens_read for cell in scored),
        oom=sum(cell.oom for cell in cells),
        errors=sum(cell.errors for cell in cells),
        not_read=sum(cell.not_read for cell in cells),
        mixed=any(cell.mixed for cell in cells),
        batches=tuple(sorted({batch for cell in cells for batch in cell.batches})),
        storages=tuple(sorted({storage for cell in cells for storage in cell.storages})),
    )


def _question(row: SampleRow) -> tuple[str, str]:
    return row.prompt_sha256, row.images_sha256


def _same(row: SampleRow, baseline: Mapping[int, SampleRow]) -> SampleRow | None:
    other = baseline.get(row.sample_id)
    return other if other is not None and _question(other) == _question(row) else None


def _agrees(row: SampleRow, baseline: Mapping[int, SampleRow]) -> bool | None:
    other = _same(row, baseline)
    return row.answer == other.answer if other is not None else row.agrees


def _compare(scored: Sequence[SampleRow], baseline: Mapping[int, SampleRow]) -> Comparison | None:
    pairs = [(other, row) for row in scored if (other := _same(row, baseline)) is not None]
    if not pairs:
        return None
    return _summarise(
        [pair([bool(old.correct) for old, _ in pairs], [bool(new.correct) for _, new in pairs])]
    )


def _summarise(tasks: Sequence[Paired]) -> Comparison | None:
    if not tasks:
        return None
    lost, gained = sum(task.lost for task in tasks), sum(task.gained for task in tasks)
    counts = Paired(sum(task.n for task in tasks), lost, gained)
    return Comparison(
        counts=counts,
        difference=math.fsum(task.difference for task in tasks) / len(tasks),
        interval=bootstrap_difference(tasks),
        p=mcnemar(lost, gained),
        detectable=detectable_difference(counts.n, counts.flips),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return math.fsum(given) / len(given) if given else None


_share: Callable[[Iterable[bool | None]], float | None] = _mean


def _estimate(values: Iterable[float | None]) -> Estimate | None:
    given = [value for value in values if value is not None]
    return mean_of_items(given) if given else None


def _combine(estimates: Sequence[Estimate]) -> Estimate | None:
    if not estimates:
        return None
    errors = [e.standard_error for e in estimates if e.standard_error is not None]
    combined = math.sqrt(math.fsum(error**2 for error in errors)) / len(estimates)
    return Estimate(
        mean=math.fsum(estimate.mean for estimate in estimates) / len(estimates),
        standard_error=combined if len(errors) == len(estimates) else None,
        n=sum(estimate.n for estimate in estimates),
    )
