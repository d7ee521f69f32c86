"""From scenarios to rows: search, measure, keep every try, go on where an earlier run stopped."""

from __future__ import annotations

import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from kvbench.efficiency.isolate import run_isolated
from kvbench.efficiency.meters import RESERVE
from kvbench.efficiency.plan import model_capacity, modelled_row
from kvbench.efficiency.request import TrialRequest, TrialResult
from kvbench.efficiency.rows import (
    ROW_KIND,
    SCHEMA,
    TRY_KIND,
    EfficiencyRow,
    Setting,
    TryRow,
    fingerprint,
    make_row,
)
from kvbench.efficiency.scenario import Conditions, Scenario, setting
from kvbench.efficiency.search import completed, largest_batch
from kvbench.errors import UserError
from kvbench.evaluation.environment import environment
from kvbench.evaluation.lines import Lines
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.store import write_run
from kvbench.models.find import find_model

RunTrial = Callable[[TrialRequest, float, Path], TrialResult]
_GIB = 1 << 30


class TimeIsUp(Exception):
    """The run's minutes are over in the middle of a try."""


def measure(
    scenarios: Sequence[Scenario],
    conditions: Conditions,
    progress: Progress,
    run: RunTrial = run_isolated,
) -> bool:
    """Make the rows that the output folder lacks, in the order of the scenarios.

    Args:
        scenarios: What to measure.
        conditions: How.
        progress: Who listens.
        run: Runs a request within so many seconds, with a log file.

    Returns:
        Whether all rows are there; not so when the minutes were over first.

    Raises:
        UserError: A scenario can't be run, or the output folder can't be used; rows so far are
            kept.
    """
    settings = [setting(scenario, conditions) for scenario in scenarios]
    with Lines(conditions.out, ROW_KIND) as rows, Lines(conditions.out, TRY_KIND) as tries:
        write_run(conditions.out, _document(scenarios, conditions))
        progress.begin(len(scenarios), 0)
        if conditions.target.device is None:
            label = conditions.target.profile.label
            progress.note(f"no GPU here has the memory of {label}: the capacity model answers")
        bench = Bench(conditions, tries, progress, run)
        for scenario, each in zip(scenarios, settings, strict=True):
            progress.cell(scenario.label)
            if rows.has(each.row_key()):
                progress.note("its row is there already")
            else:
                try:
                    row = bench.row(scenario, each)
                except TimeIsUp:
                    progress.note("the time is up: start the same command again to go on")
                    return False
                rows.append(row)
                progress.note(_summary(row))
            progress.advance()
    return True


@dataclass
class _Count:
    """What the tries of one row have come to."""

    tries: int = 0
    out_of_memory_at: int | None = None

    def add(self, batch: int, result: TrialResult) -> None:
        """One more."""
        self.tries += 1
        if result.status == "oom":
            self.out_of_memory_at = min(batch, self.out_of_memory_at or batch)


class Bench:
    """Runs tries, or finds them among those of an earlier run."""

    def __init__(
        self, conditions: Conditions, tries: Lines[TryRow], progress: Progress, run: RunTrial
    ) -> None:
        self._conditions, self._tries = conditions, tries
        self._progress, self._run = progress, run
        minutes = conditions.minutes
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def row(self, scenario: Scenario, asked: Setting) -> EfficiencyRow:
        """Measure a scenario, or model it where there is no card.

        Raises:
            TimeIsUp: Before it was done; its tries are kept.
            UserError: It must be modelled and can't be.
        """
        target = self._conditions.target
        if asked.memory == "modelled":
            model = model_capacity(find_model(scenario.model), asked.method, asked.dtype)
            return modelled_row(asked, model, target.profile, **_signature())
        count = _Count()

        def attempt(batch: int, probe: bool) -> TrialResult:
            result = self._attempt(scenario, asked, batch, probe)
            count.add(batch, result)
            return result

        batch, result = self._measured(scenario, asked, attempt)
        return make_row(
            asked,
            result,
            batch=batch,
            out_of_memory_at=count.out_of_memory_at,
            tries=count.tries,
            **_signature(),
        )

    def _measured(
        self, scenario: Scenario, asked: Setting, attempt: Callable[[int, bool], TrialResult]
    ) -> tuple[int, TrialResult]:
        """The batch that the row is about, and its full run."""
        if asked.fixed_batch is not None:
            result = attempt(asked.fixed_batch, False)
            return (asked.fixed_batch if result.status == "ok" else 0), result
        hint = self._hint(scenario, asked)
        found = largest_batch(lambda b: attempt(b, True), hint, self._conditions.tolerance)
        if found.broken or not found.largest:
            return found.largest, found.last
        batch, result, _ = completed(lambda b: attempt(b, False), found.largest)
        return batch, result

    def _hint(self, scenario: Scenario, asked: Setting) -> int | None:
        limit = self._conditions.target.profile.memory
        if asked.memory_limit is not None:
            limit = asked.memory_limit - RESERVE
        try:
            model = model_capacity(find_model(scenario.model), asked.method, asked.dtype)
        except UserError:
            return None  # not every cache has a model; doubling finds the batch as well
        guess = model.largest_batch(asked.workload(), limit, asked.prefill_rows)
        self._progress.note(f"the capacity model expects {guess} rows")
        return guess or None

    def _attempt(self, scenario: Scenario, asked: Setting, batch: int, probe: bool) -> TrialResult:
        request = TrialRequest(
            scenario.model,
            asked.method,
            asked.workload(batch),
            asked.runner,
            asked.protocol,
            dtype=asked.dtype,
            memory_limit=asked.memory_limit,
            prefill_rows=asked.prefill_rows,
            probe=probe,
            # Peers run as their users run them; one row is what there is at least.
            steady=asked.runner == "engine" and not probe and asked.searched and batch > 1,
            seed=asked.seed,
        )
        around = {name: getattr(asked, name) for name in ("revision", "device", "code", "versions")}
        key = fingerprint({"schema": SCHEMA, "request": asdict(request), **around})
        row = self._tries.get(key)
        if row is None:
            result, seconds = self._timed(request, key)
            row = TryRow(
                **vars(result), schema=SCHEMA, key=key, request=asdict(request), seconds=seconds
            )
            self._tries.append(row)
        self._progress.note(_try_summary(row, batch, probe))
        return TrialResult(**{f.name: getattr(row, f.name) for f in fields(TrialResult)})

    def _timed(self, request: TrialRequest, key: str) -> tuple[TrialResult, float]:
        limit, began = self._conditions.timeout, time.monotonic()
        left = limit if self._end is None else self._end - began
        if left <= 0:
            raise TimeIsUp
        name = re.sub(r"\W+", "-", request.method)
        log = self._conditions.out / "logs" / f"{name}-{request.workload.batch}-{key[:8]}.log"
        result = self._run(request, min(limit, left), log)
        if result.status == "timeout" and left < limit:
            raise TimeIsUp  # it might have ended in the time that every try has
        return result, time.monotonic() - began


def _signature() -> dict[str, str]:
    return {
        "machine": platform.platform(),
        "command": shlex.join(["kvbench", *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _document(scenarios: Sequence[Scenario], conditions: Conditions) -> dict[str, object]:
    device = conditions.target.device
    return {
        "request": {**asdict(conditions), "scenarios": [asdict(each) for each in scenarios]},
        "command": _signature()["command"],
        "environment": environment([device] if device else []),
    }


def _try_summary(row: TryRow, batch: int, probe: bool) -> str:
    kind = "probe" if probe else "full run"
    peak = "" if row.peak_nvml is None else f", {row.peak_nvml / _GIB:.1f} GiB"
    why = f": {row.detail}" if row.detail and row.status != "oom" else ""
    return f"  batch {batch}, {kind}: {row.status}{peak}, {row.seconds:.0f} s{why}"


def _summary(row: EfficiencyRow) -> str:
    if row.status != "ok":
        return f"{row.label}: {row.status} ({row.detail})"
    speed = "" if row.throughput is None else f", {row.throughput:,.0f} tokens/s"
    return f"{row.label}: batch {row.batch}{speed} ({row.memory})"
