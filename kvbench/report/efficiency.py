"""Efficiency rows, grouped into tables: one block for all that may be compared with each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any

from kvbench.defaults import PLAIN, REFERENCE
from kvbench.report.efficiency_paper import GPU, MODEL, PaperRow, paper_efficiency
from kvbench.report.paper import paper_table, rank

if TYPE_CHECKING:
    from kvbench.efficiency.rows import EfficiencyRow

BASES = {
    "measured": "measured on the card itself",
    "emulated": "emulated memory: measured on another card, held to this one's memory",
    "modelled": "modelled, nothing ran: memory from shapes, times as lower bounds",
}


@dataclass(frozen=True)
class Setting:
    """What numbers must share to stand in one table."""

    model: str
    model_label: str
    input_tokens: int
    vision_tokens: int
    output_tokens: int
    gpu: str
    gpu_label: str
    memory: str
    memory_limit: int | None
    device: str
    revision: str
    dtype: str
    protocol: str
    prefill_rows: int
    seed: int


SETTING_COLUMNS = tuple(field.name for field in fields(Setting))


@dataclass(frozen=True)
class Entry:
    """A row and what it is held against; None where there is nothing to compare with."""

    row: EfficiencyRow
    fp16: EfficiencyRow | None
    """The 16-bit cache in kvbench's own engine; at its largest batch, or at the row's batch."""
    generate: EfficiencyRow | None
    """Plain `generate` with a growing cache, likewise."""
    paper: PaperRow | None
    """The paper's figures, for the largest batch of its model on its cards."""

    @property
    def name(self) -> str:
        """Label of the method, with the parameters that differ from its defaults."""
        _, bracket, parameters = self.row.method.partition("[")
        return f"{self.row.label} {bracket}{parameters}".rstrip()

    @property
    def ran(self) -> bool:
        """Whether the row has figures."""
        return self.row.status == "ok" and self.row.batch > 0

    @property
    def modelled(self) -> bool:
        """Whether nothing ran: times and rates are bounds."""
        return self.row.memory == "modelled"


@dataclass(frozen=True)
class EfficiencyBlock:
    """All rows of one `Setting`: those of the largest batch, and those of batches asked for."""

    setting: Setting
    largest: tuple[Entry, ...]
    fixed: tuple[Entry, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All."""
        return (*self.largest, *self.fixed)


def efficiency_blocks(rows: Iterable[EfficiencyRow]) -> list[EfficiencyBlock]:
    """Group rows into blocks, in the paper's order of models and methods."""
    groups: dict[Setting, list[EfficiencyRow]] = defaultdict(list)
    for row in rows:
        groups[Setting(*(getattr(row, name) for name in SETTING_COLUMNS))].append(row)
    return [_block(setting, groups[setting]) for setting in sorted(groups, key=_rank)]


def ratio(mine: float | None, other: float | None) -> float | None:
    """`mine` over `other`; None where either is missing."""
    return mine / other if mine is not None and other else None


def measure(row: EfficiencyRow | None, name: str) -> float | None:
    """A figure of a row that may be missing or may not have run."""
    return None if row is None or row.status != "ok" else getattr(row, name)


def over(entry: Entry, name: str, baseline: str) -> float | None:
    """A figure over that of the entry's `fp16` or `generate`; bounds of speed aren't compared."""
    if entry.modelled and name != "batch":
        return None
    return ratio(measure(entry.row, name), measure(getattr(entry, baseline), name))


def peak(row: EfficiencyRow | None) -> float | None:
    """Peak memory in bytes: the driver's figure, or torch's where the driver gives none."""
    driver = measure(row, "peak_nvml")
    return measure(row, "peak_torch") if driver is None else driver


def kept(row: EfficiencyRow | None) -> float | None:
    """Bytes of cache and workspace: what a row of the batch costs once the prompts are in."""
    parts = [measure(row, name) for name in ("cache_bytes", "workspace_bytes")]
    return None if None in parts else sum(part for part in parts if part is not None)


def _rank(setting: Setting) -> tuple[Any, ...]:
    missing_last = tuple((value is None, value or 0) for value in astuple(setting)[2:5])
    text = tuple(str(value) for value in astuple(setting)[5:])
    return (rank(paper_table().models, setting.model), missing_last, text)


def _block(setting: Setting, rows: Sequence[EfficiencyRow]) -> EfficiencyBlock:
    ordered = sorted(rows, key=_row_rank)
    batches = {row.fixed_batch for row in ordered}
    entries = {
        batch: _entries(setting, [row for row in ordered if row.fixed_batch == batch])
        for batch in batches
    }
    fixed = [entry for b in sorted(b for b in batches if b is not None) for entry in entries[b]]
    return EfficiencyBlock(setting, tuple(entries.get(None, ())), tuple(fixed))


def _row_rank(row: EfficiencyRow) -> tuple[Any, ...]:
    foreign = row.runner == "generate"
    return (foreign, rank(paper_table().methods, row.method), row.key)


def _entries(setting: Setting, rows: Sequence[EfficiencyRow]) -> list[Entry]:
    fp16 = _first(rows, REFERENCE)
    generate = _first(rows, PLAIN)
    theirs = paper_efficiency() if (setting.model, setting.gpu) == (MODEL, GPU) else {}
    return [
        Entry(row, fp16, generate, theirs.get(row.method) if row.searched else None) for row in rows
    ]


def _first(rows: Sequence[EfficiencyRow], method: str) -> EfficiencyRow | None:
    return next((row for row in rows if row.method == method), None)
