"""A grid spread over workers, wherever they run; only this process writes.

A worker that dies is replaced, and its task goes back to the front of the queue. A task's rows
come with its end, so what a dead worker had answered is answered again and counted once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Protocol

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.calibration import (
    calibrated,
    drawn,
    keep_statistics,
    lacking,
    statistics_for,
)
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.session import Job, calibration_note, calibration_path
from kvbench.evaluation.store import Store
from kvbench.evaluation.worker import Calibrate, Outcome, Setup, Task, from_bytes

RETRIES = 2
"""How often a task is given to another worker before the run gives up."""
START_SECONDS = 900.0
"""How long to wait for a worker to start when none is at work."""


class Handle(Protocol):
    """A worker as the dispatcher sees it. Futures fail with the executor's `lost` if it dies."""

    ready: Future[str]
    """Its version of kvbench, once it has started."""

    def submit(self, task: Task) -> Future[Outcome]:
        """Give it a task; it has none."""

    def stop(self) -> None:
        """End it, whatever it does."""


class Executor(Protocol):
    """Where workers run."""

    workers: int
    """How many at once."""
    threads: int | None
    """Torch's threads on the CPU for each of them."""
    lost: tuple[type[BaseException], ...]
    """What a future fails with when its worker died."""

    def start(self, setup: Setup, place: int) -> Handle:
        """Start a worker for a place from 0 to `workers` - 1, which has none."""


def run_jobs(request: EvalRequest, jobs: Sequence[Job], store: Store, progress: Progress) -> None:
    """Run jobs in workers and store their rows as jobs end.

    Raises:
        UserError: what a worker raised, workers can't be had, or died again and again; rows so far
            are kept.
    """
    known = frozenset(row.key for row in store.rows() if store.has(row.key))
    with _executor(request) as executor:
        statistics = _statistics(executor, request, progress)
        setup = Setup(request, known, statistics, executor.threads)
        said: set[str] = set()
        with closing(outcomes(executor, setup, jobs, progress)) as results:
            for outcome in results:
                _take(outcome, store, progress, said)


def _executor(request: EvalRequest) -> AbstractContextManager[Executor]:
    if request.executor == "local":
        from kvbench.evaluation.workers_local import LocalExecutor

        return LocalExecutor(request)
    try:
        from kvbench.evaluation.workers_ray import RayExecutor
    except ImportError as error:
        raise UserError(
            f'--executor ray needs the package ray ({error}): pip install "kvbench[ray]"'
        ) from error
    return RayExecutor(request)


def _statistics(executor: Executor, request: EvalRequest, progress: Progress) -> dict[str, bytes]:
    """Each model's statistics, gathered by workers where a run's own file lacks some."""
    from kvbench.cache import load_calibration

    names = statistics_for(calibrated(request.methods))
    if not names:
        return {}
    paths = [calibration_path(request, entry) for entry in request.models]
    own = request.calibration is None
    missing = [index for index, path in enumerate(paths) if own and lacking(path, names)]
    tasks, setup = [], Setup(request, threads=executor.threads)
    for index in missing:
        samples, seed = drawn(paths[index], request.calibration_samples, request.seed)
        progress.note(calibration_note(request, request.models[index], samples))
        tasks.append(Calibrate(index, samples, seed))
    with closing(outcomes(executor, setup, tasks, progress)) as results:
        for outcome in results:
            if outcome.fault is not None:
                raise UserError(outcome.fault)
            model, content = outcome.statistics
            keep_statistics(from_bytes(content), paths[model])
    for path in paths:
        load_calibration(path, names)  # the user's may be damaged: here, before workers start
    return {
        entry.name: path.read_bytes() for entry, path in zip(request.models, paths, strict=True)
    }


def _take(outcome: Outcome, store: Store, progress: Progress, said: set[str]) -> None:
    """Store a job's rows and pass on what was said, each text once for all workers."""
    for row in outcome.rows:
        store.append(row)
    for tell, texts in ((progress.cell, outcome.cells), (progress.note, outcome.notes)):
        for text in texts:
            if text not in said:
                said.add(text)
                tell(text)
    for _ in range(outcome.advances):
        progress.advance()
    if outcome.fault is not None:
        raise UserError(outcome.fault)


def outcomes(
    executor: Executor, setup: Setup, tasks: Sequence[Task], progress: Progress
) -> Generator[Outcome]:
    """What comes of each task, once a task, in the order in which they end.

    Raises:
        UserError: a task's workers died again and again, or none can start.
    """
    crew = _Crew(executor, setup, tasks, progress)
    try:
        yield from crew.outcomes()
    finally:
        crew.stop()


@dataclass
class _Post:
    """A worker at its place, with the task it is at; None while it starts or waits."""

    place: int
    handle: Handle
    task: Task | None = None


class _Crew:
    """Workers, the tasks that are left, and who is at which."""

    def __init__(
        self, executor: Executor, setup: Setup, tasks: Sequence[Task], progress: Progress
    ) -> None:
        self._executor, self._setup, self._progress = executor, setup, progress
        self._queue, self._deaths = deque(tasks), Counter[Task | None]()
        self._pending: dict[Future[Outcome] | Future[str], _Post] = {}
        self._idle: list[_Post] = []

    def outcomes(self) -> Iterator[Outcome]:
        for place in range(min(self._executor.workers, len(self._queue))):
            self._start(place)
        while self._queue or any(post.task for post in self._pending.values()):
            while self._queue and self._idle:
                self._give(self._idle.pop(0), self._queue.popleft())
            working = any(post.task for post in self._pending.values())
            futures: Iterable[Future[Any]] = self._pending
            done = wait(futures, None if working else START_SECONDS, FIRST_COMPLETED).done
            if not done:
                raise UserError(
                    f"no worker has started within {START_SECONDS:.0f} s: see that the machines "
                    "have room for one; start again to go on, the rows so far are kept"
                )
            for future in done:
                yield from self._settle(self._pending.pop(future), future)

    def stop(self) -> None:
        for post in (*self._pending.values(), *self._idle):
            post.handle.stop()

    def _start(self, place: int) -> None:
        handle = self._executor.start(self._setup, place)
        self._pending[handle.ready] = _Post(place, handle)

    def _give(self, post: _Post, task: Task) -> None:
        post.task = task
        try:
            future = post.handle.submit(task)
        except self._executor.lost as error:  # it died while it waited
            future = Future()
            future.set_exception(error)
        self._pending[future] = post

    def _settle(self, post: _Post, future: Future[Outcome] | Future[str]) -> Iterator[Outcome]:
        """A worker has started, has ended its task, or is dead."""
        task, post.task = post.task, None
        try:
            result = future.result()
        except self._executor.lost as error:
            post.handle.stop()
            self._lose(task, error)
            self._start(post.place)
            return
        self._idle.append(post)
        if isinstance(result, Outcome):
            yield result
        else:
            self._deaths[None] = 0
            _check_version(result)

    def _lose(self, task: Task | None, error: BaseException) -> None:
        """Put a dead worker's task back, if it is not the task that kills workers."""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self._deaths[task] += 1
        if self._deaths[task] > RETRIES:
            raise UserError(
                f"a worker process died {self._deaths[task]} times {self._at(task)} ({reason}), "
                "perhaps for want of memory: start again with fewer --workers or a smaller "
                "--batch to go on; the rows so far are kept"
            ) from error
        self._progress.note(f"a worker process died {self._at(task)}; another one takes over")
        if task is not None:
            self._queue.appendleft(task)

    def _at(self, task: Task | None) -> str:
        if task is None:
            return "while it started"
        name = self._setup.request.models[task.model].name
        if isinstance(task, Calibrate):
            return f"while it calibrated {name}"
        return f"at samples {task.start + 1} to {task.stop} of {task.task} with {name}"


def _check_version(found: str) -> None:
    if found != kvbench.__version__:
        raise UserError(
            f"a worker has kvbench {found}, and this is {kvbench.__version__}: install one version "
            "everywhere, or the rows would not belong together"
        )
