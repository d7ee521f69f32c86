"""Who gets which task, with workers that are only said to be: no process, no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation import workers
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job
from kvbench.evaluation.worker import End, Lost, Message, Ready, Said, Setup, Task
from kvbench.evaluation.workers import RETRIES, results

JOBS = [Job(0, "oe", start, start + 1) for start in range(6)]
KEPT = 1
"""Rows of a job that need no run; three more are made."""

Row = Callable[..., SampleRow]


class Staged:
    """Workers that answer at once; `deaths` says (task's start, try) -> after how many rows."""

    threads = None

    def __init__(self, count: int, deaths: dict[tuple[int, int], int], make_row: Row) -> None:
        self.workers, self.deaths, self.make_row = count, deaths, make_row
        self.version, self.fault = kvbench.__version__, -1
        self.tries: dict[int, int] = {}
        self.made: list[str] = []
        self.started: list[int] = []
        self.stopped = 0

    def start(self, setup: Setup, place: int) -> Hand:
        self.started.append(place)
        return Hand(self)

    def wait(self, channels: Sequence[Any], seconds: float | None) -> list[Any]:
        return [hand for hand in channels if hand.messages]


class Hand:
    def __init__(self, stage: Staged) -> None:
        self.stage, self.channel = stage, self
        self.messages: deque[Message | Lost] = deque([Ready(stage.version)])

    def submit(self, task: Task, arrived: frozenset[str]) -> None:
        assert isinstance(task, Job) and not self.messages
        stage = self.stage
        stage.tries[task.start] = tried = stage.tries.get(task.start, 0) + 1
        after = stage.deaths.get((task.start, tried))
        self.messages.append(Said("cell", task.task))
        for number in range(3 if after is None else after):
            if (key := f"{task.start}.{number}") not in arrived:
                stage.made.append(key)
                self.messages.append(stage.make_row(key=key))
        fault = UserError("a worker's own") if task.start == stage.fault else None
        self.messages.append(End(KEPT + 3, fault) if after is None else Lost("killed by signal 9"))

    def receive(self) -> Message:
        message = self.messages.popleft()
        if isinstance(message, Lost):
            raise message
        return message

    def stop(self) -> None:
        self.stage.stopped += 1


@pytest.fixture
def run(grid: Callable[..., EvalRequest], listener: Any, make_row: Row) -> Callable[..., Any]:
    def run(
        deaths: dict[tuple[int, int], int], count: int = 2, **changes: Any
    ) -> tuple[Staged, list[str]]:
        stage = Staged(count, deaths, make_row)
        vars(stage).update(changes)
        setup, came = Setup(replace(grid(), workers=count)), list[str]()
        before = listener.advanced
        try:
            for row in results(stage, setup, JOBS, listener):
                assert isinstance(row, SampleRow)
                counted = listener.advanced - before  # of those that are here, none ahead
                assert len(came) <= counted <= len(came) + KEPT * len(JOBS)
                came.append(row.key)
        finally:
            assert stage.stopped == len(stage.started)
        return stage, came

    return run


ALL = [f"{start}.{number}" for start in range(6) for number in range(3)]


def test_each_task_once(run: Callable[..., Any], listener: Any) -> None:
    stage, came = run({})
    assert sorted(came) == ALL
    assert listener.advanced == 6 * (3 + KEPT)
    assert stage.tries == dict.fromkeys(range(6), 1)
    assert stage.started == [0, 1]
    assert listener.cells == ["oe"] and listener.notes == []  # said by every task
    assert run({}, count=20)[0].started == list(range(6))  # no more workers than tasks


@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_dead_worker_is_replaced_and_its_task_goes_on(
    run: Callable[..., Any], listener: Any, after: int
) -> None:
    stage, came = run({(2, 1): after, (5, 1): after, (5, 2): after})
    assert sorted(came) == sorted(stage.made) == ALL  # nothing was made twice
    assert listener.advanced == 6 * (3 + KEPT)
    assert stage.tries == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 3}
    assert len(stage.started) == 5
    said = "a worker process died at samples {0} to {0} of oe with tiny; another one takes over"
    assert listener.notes == [said.format(number) for number in (3, 6, 6)]


def test_a_task_that_kills_every_worker(run: Callable[..., Any]) -> None:
    deaths = {(3, tried): 0 for tried in range(1, 9)}
    said = r"died 3 times at samples 4 to 4 of oe with tiny \(killed by signal 9\), perhaps for"
    assert RETRIES == 2
    with pytest.raises(UserError, match=said):
        run(deaths)


def test_a_fault_comes_after_the_rows_before_it(run: Callable[..., Any], listener: Any) -> None:
    with pytest.raises(UserError, match="a worker's own"):
        run({}, fault=0, count=1)
    assert listener.advanced == 3 + KEPT


def test_workers_of_another_version(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"a worker has kvbench 0\.0\.9, and this is .*everywhere"):
        run({}, version="0.0.9")


def test_workers_that_never_start(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float | None] = []
    monkeypatch.setattr(Staged, "wait", lambda self, _, seconds: waited.append(seconds) or [])
    with pytest.raises(UserError, match=r"no worker has started within 900 s: .* rows so far are"):
        run({})
    assert waited == [workers.START_SECONDS]


def test_workers_that_die_while_they_start(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, listener: Any
) -> None:
    def stillborn(self: Staged, setup: Setup, place: int) -> Hand:
        self.started.append(place)
        hand = Hand(self)
        hand.messages = deque([Lost("exit code 1")])
        return hand

    monkeypatch.setattr(Staged, "start", stillborn)
    with pytest.raises(UserError, match=r"died 3 times while it started \(exit code 1\)"):
        run({})
    assert listener.notes == ["a worker process died while it started; another one takes over"] * 2
