"""What the browser of single samples shows: questions, and what every method answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import Block, Setting, newest_tasks, setting_of
from kvbench.report.cells import choose, is_mixed, never_read
from kvbench.report.html.thumbnails import Sheet
from kvbench.report.paper import label, paper_table

DIGEST = 12
"""Hexadecimal digits that are shown of a hash."""


@dataclass(frozen=True)
class Question:
    """A sample as its task's file has it; rows hold none of this."""

    instruction: str
    context: str
    choices: tuple[str, ...] | None
    """Without letters; None for an open question."""
    truth: str
    sheet: Sheet | None = None
    remark: str = ""
    """Why there is no picture, or what is to be known of it."""


Questions = Mapping[tuple[str, str], Mapping[int, Question]]
"""By data set and task, then by sample."""


def answers(blocks: Sequence[Block], rows: Iterable[SampleRow]) -> list[dict[str, Any]]:
    """Return for every block and task the answers of all methods, as plain values for JSON.

    Equal outcomes are written once, in ``outcomes`` (verdict, answer, what was read from it,
    error); ``cells`` has for each method the index of each sample's outcome, -1 for none.
    """
    groups: dict[Setting, list[SampleRow]] = defaultdict(list)
    for row in rows:
        groups[setting_of(row)].append(row)
    found = []
    for number, block in enumerate(blocks):
        by_task: dict[str, list[SampleRow]] = defaultdict(list)
        for row in newest_tasks(groups[block.setting]):
            by_task[row.task].append(row)
        found += [
            {"block": number, **_task(block, task, by_task[task])}
            for task in block.tasks
            if by_task[task]
        ]
    return found


def questions_data(questions: Mapping[int, Question]) -> dict[str, Any]:
    """Return a task's questions as plain values; equal instructions are written once."""
    instructions = list(dict.fromkeys(q.instruction for q in questions.values()))
    places = {text: place for place, text in enumerate(instructions)}
    samples = {
        str(sample): [places[q.instruction], q.context, q.choices, q.truth, q.remark]
        for sample, q in sorted(questions.items())
    }
    return {"instructions": instructions, "samples": samples}


def pictures_data(questions: Mapping[int, Question]) -> dict[str, list[Any]]:
    """Return a task's sheets by sample: base64, width, height, images shown, images."""
    return {
        str(sample): [q.sheet.base64, q.sheet.width, q.sheet.height, q.sheet.shown, q.sheet.total]
        for sample, q in sorted(questions.items())
        if q.sheet is not None
    }


def verdict(row: SampleRow, mixed: bool = False) -> str:
    """Return in a word or two what became of an answer."""
    if row.status != "ok":
        return {"oom": "out of memory"}.get(row.status, row.status)
    if mixed:
        return "mixed"
    if never_read(row):
        return "cache not read"
    if row.correct:
        return "right"
    return "empty" if row.empty else "unparsable" if row.unparsable else "wrong"


def _task(block: Block, task: str, rows: Sequence[SampleRow]) -> dict[str, Any]:
    by_method: dict[str, list[SampleRow]] = defaultdict(list)
    for row in rows:
        by_method[row.method].append(row)
    methods = [method for method in block.methods if method in by_method]
    mixed = {method: is_mixed(by_method[method]) for method in methods}
    chosen = {m: {row.sample_id: row for row in choose(by_method[m])} for m in methods}
    samples = sorted({sample for found in chosen.values() for sample in found})
    outcomes: dict[tuple[Any, ...], int] = {}
    cells = []
    for method in methods:
        found = (chosen[method].get(sample) for sample in samples)
        keys = [None if row is None else _outcome(row, mixed[method]) for row in found]
        cells.append(
            [-1 if key is None else outcomes.setdefault(key, len(outcomes)) for key in keys]
        )
    paper = paper_table()
    return {
        "task": task,
        "label": label(paper.tasks, task),
        "samples": samples,
        "facts": [_facts([chosen[m][s] for m in methods if s in chosen[m]]) for s in samples],
        "methods": [[method, label(paper.methods, method)] for method in methods],
        "outcomes": list(outcomes),
        "cells": cells,
        "kl_first": [_numbers(chosen[m].get(s) for s in samples)[0] for m in methods],
        "kl_mean": [_numbers(chosen[m].get(s) for s in samples)[1] for m in methods],
    }


def _outcome(row: SampleRow, mixed: bool) -> tuple[Any, ...]:
    return verdict(row, mixed), row.answer, row.extracted, row.error


def _facts(rows: Sequence[SampleRow]) -> list[Any]:
    """Prompt tokens, images kept, images, whether cut, and the hashes of prompt and images."""
    row = rows[0]
    hashes = (row.prompt_sha256[:DIGEST], row.images_sha256[:DIGEST])
    return [row.prompt_tokens, row.images_kept, row.images_total, int(row.truncated), *hashes]


def _numbers(rows: Iterable[SampleRow | None]) -> tuple[list[float | None], list[float | None]]:
    pairs = [(None, None) if row is None else (row.kl_first, row.kl_mean) for row in rows]
    return [_short(first) for first, _ in pairs], [_short(mean) for _, mean in pairs]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")
