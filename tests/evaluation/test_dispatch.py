"""Who gets which task, with workers that are only said to be: no process, no model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation import workers
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.session import Job
from kvbench.evaluation.worker import Outcome, Setup, Task
from kvbench.evaluation.workers import RETRIES, outcomes

JOBS = [Job(0, "oe", start, start + 1) for start in range(6)]


class Died(Exception):
    """What futures of a dead worker fail with."""


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class Staged:
    """Workers that answer at once, or do as `deaths` says: (task's start, try) -> how it dies."""

    threads = None
    lost: tuple[type[BaseException], ...] = (Died,)

    def __init__(self, count: int, deaths: dict[tuple[int, int], str], version: str) -> None:
        self.workers, self.deaths, self.version = count, deaths, version
        self.tries: dict[int, int] = {}
        self.started: list[int] = []
        self.stopped = 0

    def start(self, setup: Setup, place: int) -> Hand:
        self.started.append(place)
        return Hand(self)


class Hand:
    def __init__(self, stage: Staged) -> None:
        self.stage = stage
        self.ready: Future[str] = done(stage.version)

    def submit(self, task: Task) -> Future[Outcome]:
        assert isinstance(task, Job)
        self.stage.tries[task.start] = tried = self.stage.tries.get(task.start, 0) + 1
        how = self.stage.deaths.get((task.start, tried))
        if how == "while it waited":
            raise Died(how)
        return done(Died(how) if how else Outcome(cells=[str(task.start)]))

    def stop(self) -> None:
        self.stage.stopped += 1


@pytest.fixture
def run(grid: Callable[..., EvalRequest], listener: Any) -> Callable[..., Any]:
    def run(
        deaths: dict[tuple[int, int], str],
        count: int = 2,
        version: str = workers.kvbench.__version__,
    ) -> tuple[Staged, list[str]]:
        stage = Staged(count, deaths, version)
        request = replace(grid(), workers=count)
        try:
            ended = [one.cells[0] for one in outcomes(stage, Setup(request), JOBS, listener)]
        finally:
            assert stage.stopped == len(stage.started)
        return stage, ended

    return run


def test_each_task_once(run: Callable[..., Any], listener: Any) -> None:
    stage, ended = run({})
    assert sorted(ended) == ["0", "1", "2", "3", "4", "5"]
    assert stage.tries == dict.fromkeys(range(6), 1)
    assert stage.started == [0, 1] and listener.notes == []
    assert run({}, count=20)[0].started == list(range(6))  # no more workers than tasks


@pytest.mark.parametrize("how", ["at work", "while it waited"])
def test_a_dead_worker_is_replaced_and_its_task_done_once(
    run: Callable[..., Any], listener: Any, how: str
) -> None:
    stage, ended = run({(2, 1): how, (5, 1): how, (5, 2): how})
    assert sorted(ended) == ["0", "1", "2", "3", "4", "5"]
    assert stage.tries == {0: 1, 1: 1, 2: 2, 3: 1, 4: 1, 5: 3}
    assert len(stage.started) == 5
    said = "a worker process died at samples {0} to {0} of oe with tiny; another one takes over"
    assert listener.notes == [said.format(number) for number in (3, 6, 6)]


def test_a_task_that_kills_every_worker(run: Callable[..., Any]) -> None:
    deaths = {(3, tried): "killed by signal 9" for tried in range(1, 9)}
    said = r"died 3 times at samples 4 to 4 of oe with tiny \(killed by signal 9\), perhaps for"
    assert RETRIES == 2
    with pytest.raises(UserError, match=said):
        run(deaths)


def test_workers_of_another_version(run: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"a worker has kvbench 0\.0\.9, and this is .*everywhere"):
        run({}, version="0.0.9")


def test_workers_that_never_start(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(Hand):
        def __init__(self, stage: Staged) -> None:
            super().__init__(stage)
            self.ready = Future()

    monkeypatch.setattr(workers, "START_SECONDS", 0.01)
    monkeypatch.setattr(Staged, "start", lambda self, *_: self.started.append(0) or Absent(self))
    with pytest.raises(UserError, match=r"no worker has started within 0 s: .* rows so far are"):
        run({})
