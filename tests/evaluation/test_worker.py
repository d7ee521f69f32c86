"""What a worker says of its tasks, in this very process."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation import runner
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job
from kvbench.evaluation.worker import (
    Calibrate,
    End,
    Message,
    Ready,
    Said,
    Setup,
    Statistics,
    Worker,
    from_bytes,
)

Grid = Callable[..., EvalRequest]
JOB = Job(0, "oe", 0, 2)


def rows_of(messages: list[Message]) -> list[SampleRow]:
    return [message for message in messages if isinstance(message, SampleRow)]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Gets "answering" whenever a method begins, and what a worker that is given it says."""
    messages: list[Any] = []
    answer = runner.answer

    def watched(*arguments: Any) -> Any:
        messages.append("answering")
        return answer(*arguments)

    monkeypatch.setattr(runner, "answer", watched)
    return messages


def test_rows_are_handed_over_one_method_after_the_other(grid: Grid, said: list[Any]) -> None:
    worker = Worker(Setup(grid(methods="fp16,rtn_int2", batch=2)), said.append)
    worker.run(JOB)
    kinds = [one if isinstance(one, str) else type(one) for one in said]
    batch = ["answering", SampleRow, SampleRow]
    assert kinds == [Ready, Said, *batch, *batch, End]
    assert said[1] == Said("cell", "tiny · OE") and said[-1] == End(4)


def test_rows_that_have_arrived_are_not_made_again(grid: Grid, said: list[Any]) -> None:
    setup = Setup(grid(methods="fp16,rtn_int2,rtn_int4"))
    Worker(setup, said.append).run(Job(0, "oe", 0, 1))
    rows = rows_of(said)
    said.clear()
    arrived = frozenset(row.key for row in rows[:2])
    Worker(dataclasses.replace(setup, known=frozenset([rows[1].key])), said.append).run(
        Job(0, "oe", 0, 1), arrived
    )
    (last,) = rows_of(said)
    assert dataclasses.replace(last, seconds=rows[2].seconds) == rows[2]
    assert said.count("answering") == 2  # the 16-bit cache once more, to compare with
    assert said[-1] == End(3)
    said.clear()


def test_a_task_knows_nothing_of_the_one_before(grid: Grid, said: list[Any]) -> None:
    worker = Worker(Setup(grid()), said.append)
    worker.run(JOB)
    worker.run(JOB)
    keys = [row.key for row in rows_of(said)]
    assert len(keys) == 4 and keys[:2] == keys[2:]


def test_a_users_fault_comes_after_the_rows_before_it(
    grid: Grid, said: list[Any], drawn: Path, tmp_path: Path
) -> None:
    shutil.copytree(drawn, tmp_path / "data")
    next((tmp_path / "data" / "ObjectExistence" / "images").glob("1_*")).write_bytes(b"no image")
    worker = Worker(Setup(grid(data_root=tmp_path / "data")), said.append)
    worker.run(Job(0, "oe", 0, 1))
    worker.run(Job(0, "oe", 1, 2))
    first, second = (message for message in said if isinstance(message, End))
    assert (first.samples, first.error, len(rows_of(said))) == (1, None, 1)
    assert type(second.error) is UserError and "not an image" in str(second.error)


@pytest.mark.parametrize("fault", [ZeroDivisionError("by nought"), SystemExit("left")])
def test_a_programs_fault_comes_with_its_place(
    grid: Grid, said: list[Any], monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def broken(*_: Any) -> Any:
        raise fault

    monkeypatch.setattr(runner, "answer", broken)
    Worker(Setup(grid()), said.append).run(JOB)
    error = said[-1].error
    assert isinstance(error, RuntimeError)
    assert type(fault).__name__ in str(error) and "in broken" in str(error)


def test_statistics_come_as_a_file(grid: Grid, said: list[Any]) -> None:
    Worker(Setup(grid(methods="smoothquant")), said.append).run(Calibrate(0, 2, 0))
    _, found, end = said
    assert isinstance(found, Statistics) and found.model == 0
    assert from_bytes(found.content).statistics
    assert end == End(0)
