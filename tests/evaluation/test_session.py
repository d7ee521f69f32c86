"""One process of a grid: jobs, models one after the other, peers that can't run."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvbench.errors import UserError
from kvbench.evaluation import session as session_module
from kvbench.evaluation.choices import MethodChoice
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job, Session
from kvbench.evaluation.store import read_rows

Grid = Callable[..., EvalRequest]


class Rows:
    """A sink in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, SampleRow] = {}

    def has(self, key: str) -> bool:
        return key in self.rows

    def append(self, row: SampleRow) -> bool:
        self.rows[row.key] = row
        return True


def test_jobs_cover_the_grid_model_by_model(grid: Grid, tiny_llava_folder: Path) -> None:
    models = f"a={tiny_llava_folder},b={tiny_llava_folder}"
    session = Session(grid(models=models, batch=4), Rows(), Silent())
    assert session.jobs() == [
        Job(model, task, start, stop)
        for model in (0, 1)
        for task in ("oe", "wqa")
        for start, stop in ((0, 4), (4, 6))
    ]


def test_a_job_answers_its_samples_alone(grid: Grid) -> None:
    sink = Rows()
    with Session(grid(batch=2), sink, Silent()) as session:
        session.run(Job(0, "oe", 2, 4))
    assert [row.sample_id for row in sink.rows.values()] == [2, 3]
    assert {row.batch for row in sink.rows.values()} == {2}


def test_one_model_is_held_at_a_time(
    grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llava_folder: Path,
    tiny_llava_next_folder: Path,
) -> None:
    load, held = session_module.load, []

    def watched(*arguments: Any) -> Any:
        assert not any(reference() is not None for reference in held)
        loaded = load(*arguments)
        held.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(session_module, "load", watched)
    models = f"a={tiny_llava_folder},b={tiny_llava_next_folder},c={tiny_llava_folder}"
    request = grid(models=models, methods="fp16,akvq_vl[recent=64]", limit=1)
    gc.disable()  # no luck: the model must go when it is let go
    try:
        with Session(request, Rows(), Silent()) as session:
            for job in session.jobs():
                session.run(job)
            assert len(held) == 3
    finally:
        gc.enable()


class Peer:
    """A peer's cache that a model can't have."""

    label: ClassVar[str] = "peer"
    paper: ClassVar[str] = "-"
    splits_prompt: ClassVar[bool] = False
    concatenates: ClassVar[bool] = False

    def cache(self, model: Any, protocol: str) -> Any:
        raise UserError(f"not under {protocol}")

    def nbytes(self, cache: Any) -> int:
        return 0


def test_peers_that_cannot_run_are_told_of_and_left_out(grid: Grid, listener: Any) -> None:
    from kvbench.evaluation.run import evaluate

    request = grid(tasks="oe", limit=1)
    methods = (*request.methods, MethodChoice("peer", Peer()))  # type: ignore[arg-type]
    evaluate(dataclasses.replace(request, methods=methods), listener)
    assert listener.notes == [
        "peer is left out under quantized_prefill: not under quantized_prefill"
    ]
    assert [row.method for row in read_rows(request.out / "samples.jsonl")] == ["fp16"]


def test_methods_of_our_own_that_cannot_run_end_the_run(grid: Grid) -> None:
    from kvbench.evaluation.run import evaluate

    with pytest.raises(UserError, match="cut into groups of 7"):
        evaluate(grid(methods="fp16,rtn_int4[group_size=7]", limit=1), Silent())


def test_a_cell_is_read_once(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    read, names = session_module.read_cell, []

    def counted(name: str, *more: Any) -> Any:
        names.append(name)
        return read(name, *more)

    monkeypatch.setattr(session_module, "read_cell", counted)
    session = Session(grid(), Rows(), Silent())
    assert session.jobs() == session.jobs()
    assert names == ["oe", "wqa"]
