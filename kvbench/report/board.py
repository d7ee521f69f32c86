"""Result rows, grouped into tables: one block for all that may be compared with each other."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from kvbench.defaults import REFERENCE
from kvbench.evaluation.rows import PROTOCOLS, SampleRow
from kvbench.report.cells import Cell, make_cell, over_tasks, scored_rows
from kvbench.report.paper import paper_table, rank


@dataclass(frozen=True)
class Setting:
    """What numbers must share to stand in one table."""

    model: str
    protocol: str
    dataset: str
    revision: str
    dtype: str
    prompt_style: str
    generation: str
    """Generation settings as canonical JSON."""
    version: str


SETTING_COLUMNS = tuple(field.name for field in fields(Setting))


@dataclass(frozen=True)
class Block:
    """One table: methods by tasks, all of one `Setting`, in the paper's order."""

    setting: Setting
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    """By (method, task); a task that a method lacks has no entry."""
    overall: Mapping[str, Cell]
    """By method: the mean over `averaged`."""
    averaged: tuple[str, ...]
    """The tasks that the mean is taken of: the paper's if there are any, else all."""

    @property
    def samples(self) -> tuple[int, ...]:
        """Different numbers of samples a task should have, ascending."""
        return tuple(sorted({cell.expected for cell in self.cells.values()}))

    @property
    def batches(self) -> tuple[int, ...]:
        """Different numbers of samples that were generated together, ascending."""
        return tuple(sorted({batch for cell in self.cells.values() for batch in cell.batches}))


@dataclass(frozen=True)
class Leaderboard:
    """All blocks of a run, with what ``run.json`` says of it."""

    blocks: tuple[Block, ...]
    run: Mapping[str, Any]

    @property
    def command(self) -> str | None:
        """The command line that made the rows, if ``run.json`` tells."""
        command = _request(self.run).get("command")
        return command if isinstance(command, str) else None

    @property
    def machine(self) -> str | None:
        """Device and versions of the last run that added rows, if ``run.json`` tells."""
        ran = self.run.get("environment")
        if not isinstance(ran, Mapping):
            return None
        packages = ran.get("packages") or {}
        devices = ", ".join(sorted(set(ran.get("devices") or []))) or f"CPU, {ran.get('machine')}"
        versions = (f"{name} {packages.get(name)}" for name in ("torch", "transformers"))
        return f"{devices}; {', '.join(versions)}"


def build(rows: Iterable[SampleRow], run: Mapping[str, Any] | None = None) -> Leaderboard:
    """Group rows into blocks. Their order does not matter.

    Args:
        rows: Result rows of any number of models, protocols and methods.
        run: Content of ``run.json``; ``request.samples`` maps tasks to planned samples, and
            ``request.command`` is the command line.
    """
    groups: dict[Setting, list[SampleRow]] = defaultdict(list)
    for row in rows:
        groups[setting_of(row)].append(row)
    planned = _planned(run or {})
    ordered = sorted(groups, key=_block_rank)
    blocks = (_block(s, groups[s], _due(s, groups, planned)) for s in ordered)
    return Leaderboard(tuple(blocks), run or {})


def _due(
    setting: Setting, groups: Mapping[Setting, list[SampleRow]], planned: Mapping[str, int]
) -> dict[str, int]:
    """Planned tasks that this block should have: those that no other data set has instead."""
    elsewhere = {
        row.task
        for other, rows in groups.items()
        if other.dataset != setting.dataset and other.model == setting.model
        for row in rows
    }
    own = {row.task for row in groups[setting]}
    return {task: n for task, n in planned.items() if task in own or task not in elsewhere}


def setting_of(row: SampleRow) -> Setting:
    """Return the setting of a row's block."""
    return Setting(
        model=row.model,
        protocol=row.protocol,
        dataset=row.dataset,
        revision=row.revision,
        dtype=row.dtype,
        prompt_style=row.prompt_style,
        generation=json.dumps(row.generation, sort_keys=True),
        version=row.version,
    )


def _block_rank(setting: Setting) -> tuple[Any, ...]:
    model = rank(paper_table().models, setting.model)
    return (model, PROTOCOLS.index(setting.protocol), astuple(setting))


def _block(setting: Setting, rows: Sequence[SampleRow], planned: Mapping[str, int]) -> Block:
    paper = paper_table()
    rows = newest_tasks(rows)
    groups: dict[tuple[str, str], list[SampleRow]] = defaultdict(list)
    seen: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        groups[row.method, row.task].append(row)
        seen[row.task].add(row.sample_id)
    tasks = tuple(sorted({*seen, *planned}, key=lambda task: rank(paper.tasks, task)))
    methods = tuple(
        sorted({row.method for row in rows}, key=lambda method: rank(paper.methods, method))
    )
    expected = {task: max(len(seen[task]), planned.get(task, 0)) for task in tasks}
    cells = {
        (method, task): make_cell(group, _baseline(groups, method, task), expected[task])
        for (method, task), group in groups.items()
    }
    averaged = tuple(task for task in tasks if task in paper.tasks) or tasks
    overall = {
        method: over_tasks(
            [cells.get((method, task), Cell(0, expected[task], 0)) for task in averaged]
        )
        for method in methods
    }
    return Block(setting, tasks, methods, cells, overall, averaged)


def newest_tasks(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """Return the rows of each task's newest version: the only ones that a block shows."""
    newest: dict[str, int] = {}
    for row in rows:
        newest[row.task] = max(row.task_version, newest.get(row.task, row.task_version))
    return [row for row in rows if row.task_version == newest[row.task]]


def _baseline(
    groups: Mapping[tuple[str, str], list[SampleRow]], method: str, task: str
) -> dict[int, SampleRow]:
    rows = groups.get((REFERENCE, task), []) if method != REFERENCE else []
    return {row.sample_id: row for row in scored_rows(rows)}


def _request(run: Mapping[str, Any]) -> Mapping[str, Any]:
    request = run.get("request")
    return request if isinstance(request, Mapping) else {}


def _planned(run: Mapping[str, Any]) -> dict[str, int]:
    samples = _request(run).get("samples")
    if not isinstance(samples, Mapping):
        return {}
    return {str(task): n for task, n in samples.items() if isinstance(n, int) and n > 0}
