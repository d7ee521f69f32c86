"""The paper's efficiency claims as one run: what is measured, and how large each gain should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from tabulate import tabulate

from kvbench.defaults import PLAIN, QUANTO, REFERENCE, REPRODUCED
from kvbench.efficiency.plan import model_capacity
from kvbench.efficiency.rows import EfficiencyRow
from kvbench.efficiency.scenario import Scenario
from kvbench.errors import UserError
from kvbench.registry import MODELS

MODEL = "llava15_7b"
_SHORT, _LONG, _ANSWER = 600, 4000, 512
_EQUAL, _PEERS = 40, 80
"""Equal batches: the paper's fp16 batch, and one that transformers' quanto cache can hold."""


def paper_scenarios(model: str = MODEL) -> list[Scenario]:
    """Everything that `goals` asks for, what matters most first."""

    def scenario(method: str, tokens: int = _SHORT, batch: int | None = None) -> Scenario:
        return Scenario(model, method, tokens, _ANSWER, batch=batch)

    return [
        scenario(REFERENCE),
        scenario(REPRODUCED),
        scenario(REPRODUCED, batch=_EQUAL),
        scenario(REFERENCE, batch=_EQUAL),
        scenario(PLAIN, batch=_EQUAL),
        scenario(REFERENCE, _LONG),
        scenario(REPRODUCED, _LONG),
        scenario(PLAIN),
        scenario(REPRODUCED, batch=_PEERS),
        scenario(QUANTO, batch=_PEERS),
    ]


class Rows:
    """Rows of one run that were measured, found by method, prompt and batch."""

    def __init__(self, rows: Iterable[EfficiencyRow]) -> None:
        self._rows = {
            (row.method, row.input_tokens, row.fixed_batch): row
            for row in rows
            if row.memory != "modelled"
        }

    def get(
        self, method: str, tokens: int = _SHORT, batch: int | None = None
    ) -> EfficiencyRow | None:
        """The row, if it has figures."""
        row = self._rows.get((method, tokens, batch))
        return row if row is not None and row.status == "ok" else None

    def ratio(
        self,
        figure: str,
        over: str,
        method: str = REPRODUCED,
        tokens: int = _SHORT,
        batch: int | None = None,
    ) -> float | None:
        """A figure of `method` over the same of `over`; None where either is missing."""
        values = [_figure(self.get(each, tokens, batch), figure) for each in (method, over)]
        return values[0] / values[1] if values[0] is not None and values[1] else None

    def at_floors(self, tokens: int = _SHORT) -> float | None:
        """Throughput over the reference's, prompts as measured and decode steps at their floors."""
        rates = [_at_floor(self.get(method, tokens)) for method in (REPRODUCED, REFERENCE)]
        return rates[0] / rates[1] if rates[0] and rates[1] else None

    def kept(self) -> float | None:
        """Cache and workspace of the reference over ours, at equal batch."""
        pair = [self.get(method, batch=_EQUAL) for method in (REFERENCE, REPRODUCED)]
        sizes = [row and sum(filter(None, (row.cache_bytes, row.workspace_bytes))) for row in pair]
        return sizes[0] / sizes[1] if sizes[0] and sizes[1] else None

    def worst_model(self) -> float | None:
        """The capacity model's largest error of a measured peak, in percent of it."""
        errors = [_error(row) for row in self._rows.values() if row.status == "ok"]
        return max((error for error in errors if error is not None), default=None)

    def slowest_prompts(self) -> float | None:
        """The longest micro-batch of prompts over the median one of its row, in any row.

        Far above one, something else than prompts was on the clock: a compilation, a wait.
        """
        rows = [row.prompts_s for row in self._rows.values() if len(row.prompts_s) > 1]
        return max((max(times) / median(times) for times in rows), default=None)


@dataclass(frozen=True)
class Goal:
    """A figure and how good it should be.

    Attributes:
        what: The figure.
        unit: "×" or "%".
        least: It should be at least as good; None: it only says what there is to be had.
        hope: It would be good; None: no more is hoped for.
        value: Its value, None where rows are missing.
        below: Whether smaller is better.
    """

    what: str
    unit: Literal["×", "%"]  # noqa: RUF001
    least: float | None
    hope: float | None
    value: Callable[[Rows], float | None]
    below: bool = False

    def verdict(self, value: float | None) -> str:
        """How the value stands against both marks."""
        sign = -1 if self.below else 1
        if value is None:
            return "not measured"
        if self.least is None:
            return ""
        if sign * value < sign * self.least:
            return "missed"
        return "hoped for" if self.hope and sign * value >= sign * self.hope else "met"


_TIMES: Literal["×"] = "×"  # noqa: RUF001
_OURS = f"{REPRODUCED} over {REFERENCE}"
_BOUND = "the same if decode steps of both were at their floors"
GOALS: tuple[Goal, ...] = (
    Goal(f"largest batch, {_SHORT} in, {_ANSWER} out: {_OURS}", _TIMES, 3.25, 3.6,
         lambda rows: rows.ratio("batch", REFERENCE)),
    Goal(f"throughput there: {_OURS}", _TIMES, 2.2, 2.6,
         lambda rows: rows.ratio("throughput", REFERENCE)),
    Goal(_BOUND, _TIMES, None, None, lambda rows: rows.at_floors()),
    Goal("the same of decode steps alone, without prompts", _TIMES, 2.2, 2.6,
         lambda rows: rows.ratio("decode_throughput", REFERENCE)),
    Goal(f"throughput there: {REPRODUCED} over plain generate", _TIMES, 6, 12,
         lambda rows: rows.ratio("throughput", PLAIN)),
    Goal(f"decode step over its floor there: {REFERENCE}", _TIMES, 1.35, 1.15,
         lambda rows: _figure(rows.get(REFERENCE), "over_floor"), below=True),
    Goal(f"decode step over its floor there: {REPRODUCED}", _TIMES, 1.35, 1.15,
         lambda rows: _figure(rows.get(REPRODUCED), "over_floor"), below=True),
    Goal(f"throughput at batch {_EQUAL}: {REFERENCE} over plain generate", _TIMES, 3, 6,
         lambda rows: rows.ratio("throughput", PLAIN, REFERENCE, batch=_EQUAL)),
    Goal(f"cache and workspace at batch {_EQUAL}: {REFERENCE} over {REPRODUCED}", _TIMES, 3.2, 3.7,
         lambda rows: rows.kept()),
    Goal(f"largest batch, {_LONG} in, {_ANSWER} out: {_OURS}", _TIMES, 5, 5.6,
         lambda rows: rows.ratio("batch", REFERENCE, tokens=_LONG)),
    Goal(f"throughput there: {_OURS}", _TIMES, 3.8, 4.8,
         lambda rows: rows.ratio("throughput", REFERENCE, tokens=_LONG)),
    Goal(_BOUND, _TIMES, None, None, lambda rows: rows.at_floors(_LONG)),
    Goal("the same of decode steps alone, without prompts", _TIMES, 3.8, 4.8,
         lambda rows: rows.ratio("decode_throughput", REFERENCE, tokens=_LONG)),
    Goal(f"throughput at batch {_PEERS}: {REPRODUCED} over quanto's 2-bit cache", _TIMES, 5, 10,
         lambda rows: rows.ratio("throughput", QUANTO, batch=_PEERS)),
    Goal("longest micro-batch of prompts over the median, any row", _TIMES, 1.5, None,
         lambda rows: rows.slowest_prompts(), below=True),
    Goal("largest error of the capacity model's peak", "%", 5, None,
         lambda rows: rows.worst_model(), below=True),
)  # fmt: skip


def has_all(rows: Sequence[EfficiencyRow]) -> bool:
    """Whether rows have a figure for every goal."""
    found = Rows(rows)
    return all(goal.value(found) is not None for goal in GOALS)


def goals_table(rows: Sequence[EfficiencyRow], style: str = "simple") -> str:
    """Every goal with its marks and what was measured; `style` as of tabulate."""
    found = Rows(rows)
    lines = []
    for goal in GOALS:
        value = goal.value(found)
        marks = ["" if mark is None else _mark(goal, mark) for mark in (goal.least, goal.hope)]
        got = "-" if value is None else f"{value:.2f}{goal.unit}"
        lines.append([goal.what, *marks, got, goal.verdict(value)])
    headers = ["what", "at least", "hope for", "measured", ""]
    alignment = ("left", "right", "right", "right", "left")
    return tabulate(lines, headers, style, disable_numparse=True, colalign=alignment)


def _mark(goal: Goal, mark: float) -> str:
    return f"{'≤ ' if goal.below else ''}{mark:g}{goal.unit}"


def _figure(row: EfficiencyRow | None, name: str) -> float | None:
    return None if row is None else getattr(row, name)


def _at_floor(row: EfficiencyRow | None) -> float | None:
    """Tokens a second if every decode step took no longer than its floor."""
    if row is None or row.ttft_s is None or row.floor_s is None:
        return None
    seconds = row.ttft_s + (row.output_tokens - 1) * row.floor_s
    return row.batch * row.output_tokens / seconds


def _error(row: EfficiencyRow) -> float | None:
    """Of the capacity model's peak, in percent; None where there is no model or no measurement.

    Of plain `generate` the allocator's figure counts: the driver's has all that growing caches
    left behind, up to the limit.
    """
    try:
        model = model_capacity(MODELS.get(row.model), row.method, row.dtype)
    except UserError:
        return None
    peak = model.footprint(row.workload(row.batch), row.prefill_rows)
    generate = row.runner == "generate"
    expected, found = (peak.allocated, row.peak_torch) if generate else (peak.total, row.peak_nvml)
    return 100 * abs(expected / found - 1) if found else None
