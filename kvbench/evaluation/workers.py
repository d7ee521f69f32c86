"""A grid spread over workers, wherever they run; only this process writes.

Workers hand over each row when it is made. One that dies is replaced, and its task goes back to the
front of the queue with the keys of the rows that have arrived: those are not answered again, but
for the 16-bit cache's answers, which the others are measured against.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
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
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job, calibration_note, calibration_path
from kvbench.evaluation.store import Store
from kvbench.evaluation.worker import (
    Calibrate,
    End,
    Lost,
    Message,
    Ready,
    Said,
    Setup,
    Statistics,
    Task,
    from_bytes,
)

RETRIES = 2
"""How often a task is given to another worker before the run gives up."""
START_SECONDS = 900.0
"""How long to wait for a worker to start when none is at work."""


class Handle(Protocol):
    """A worker as the dispatcher sees it. Its first message is `Ready`, a task's last one `End`."""

    @property
    def channel(self) -> Any:
        """What `Executor.wait` watches until that message has come."""

    def submit(self, task: Task, arrived: frozenset[str]) -> None:
        """Give it a task, of which some rows have arrived already; it has none."""

    def receive(self) -> Message:
        """Its next message.

        Raises:
            Lost: it is dead, and all that it had said is received.
        """

    def stop(self) -> None:
        """End it, whatever it does."""


class Executor(Protocol):
    """Where workers run."""

    workers: int
    """How many at once."""
    threads: int | None
    """Torch's threads on the CPU for each of them."""

    def start(self, setup: Setup, place: int) -> Handle:
        """Start a worker for a place from 0 to `workers` - 1, which has none."""

    def wait(self, channels: Sequence[Any], seconds: float | None) -> list[Any]:
        """Those of which something can be received, a death too; none when the time is over."""


def run_jobs(request: EvalRequest, jobs: Sequence[Job], store: Store, progress: Progress) -> None:
    """Run jobs in workers and store each row as soon as it is made.

    Raises:
        UserError: what a worker raised, workers can't be had, or died again and again; rows so far
            are kept.
    """
    known = frozenset(row.key for row in store.rows() if store.has(row.key))
    with _executor(request) as executor:
        statistics = _statistics(executor, request, progress)
        setup = Setup(request, known, statistics, executor.threads)
        with closing(results(executor, setup, jobs, progress)) as rows:
            for row in rows:
                if isinstance(row, SampleRow):
                    store.append(row)


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
    with closing(results(executor, setup, tasks, progress)) as found:
        for statistics in found:
            if isinstance(statistics, Statistics):
                keep_statistics(from_bytes(statistics.content), paths[statistics.model])
    for path in paths:
        load_calibration(path, names)  # the user's may be damaged: here, before workers start
    return {
        entry.name: path.read_bytes() for entry, path in zip(request.models, paths, strict=True)
    }


def results(
    executor: Executor, setup: Setup, tasks: Sequence[Task], progress: Progress
) -> Generator[SampleRow | Statistics]:
    """What comes of the tasks, as it comes: each row once, however often its worker dies.

    A sample is counted when the caller asks for what follows its row; a text is said once.

    Raises:
        UserError: a task's own, its workers died again and again, or none can start.
    """
    crew = _Crew(executor, setup, tasks, progress)
    try:
        yield from crew.results()
    finally:
        crew.stop()


@dataclass
class _Work:
    """A task, the keys of its rows that have arrived, and how many workers died of it."""

    task: Task
    arrived: set[str] = field(default_factory=set)
    deaths: int = 0


@dataclass
class _Post:
    """A worker at its place, with the work it is at; None while it starts or waits."""

    place: int
    handle: Handle
    ready: bool = False
    work: _Work | None = None


class _Crew:
    """Workers, the tasks that are left, and who is at which."""

    def __init__(
        self, executor: Executor, setup: Setup, tasks: Sequence[Task], progress: Progress
    ) -> None:
        self._executor, self._setup, self._progress = executor, setup, progress
        self._queue = deque(map(_Work, tasks))
        self._posts: dict[int, _Post] = {}
        self._said: set[Said] = set()
        self._failed_starts = 0

    def results(self) -> Iterator[SampleRow | Statistics]:
        for place in range(min(self._executor.workers, len(self._queue))):
            self._start(place)
        while self._queue or self._at_work():
            for post in self._posts.values():
                if self._queue and post.ready and post.work is None:
                    post.work = self._queue.popleft()
                    post.handle.submit(post.work.task, frozenset(post.work.arrived))
            for post in self._speaking():
                yield from self._hear(post)

    def stop(self) -> None:
        for post in self._posts.values():
            post.handle.stop()

    def _start(self, place: int) -> None:
        self._posts[place] = _Post(place, self._executor.start(self._setup, place))

    def _at_work(self) -> bool:
        return any(post.work for post in self._posts.values())

    def _speaking(self) -> list[_Post]:
        """Workers who have something to say."""
        awaited = [post for post in self._posts.values() if post.work or not post.ready]
        posts = {post.handle.channel: post for post in awaited}
        seconds = None if self._at_work() else START_SECONDS
        channels = self._executor.wait(list(posts), seconds)
        if not channels:
            raise UserError(
                f"no worker has started within {START_SECONDS:.0f} s: see that the machines "
                "have room for one; start again to go on, the rows so far are kept"
            )
        return [posts[channel] for channel in channels]

    def _hear(self, post: _Post) -> Iterator[SampleRow | Statistics]:
        """One message of a worker, or its death."""
        try:
            message = post.handle.receive()
        except Lost as error:
            self._replace(post, error)
            return
        match message:
            case Ready():
                _check_version(message.version)
                post.ready, self._failed_starts = True, 0
            case Said():
                self._say(message)
            case End():
                self._end(post, message)
            case SampleRow():
                yield message
                self._count(post, message)
            case Statistics():
                yield message

    def _say(self, said: Said) -> None:
        if said not in self._said:
            self._said.add(said)
            (self._progress.cell if said.to == "cell" else self._progress.note)(said.text)

    def _count(self, post: _Post, row: SampleRow) -> None:
        assert post.work is not None
        post.work.arrived.add(row.key)
        self._progress.advance()

    def _end(self, post: _Post, end: End) -> None:
        """Count samples that needed no run; those whose row arrived, in any try, are counted."""
        assert post.work is not None
        for _ in range(end.samples - len(post.work.arrived)):
            self._progress.advance()
        post.work = None
        if end.error is not None:
            raise end.error

    def _replace(self, post: _Post, error: Lost) -> None:
        """Put a dead worker's task back, if it is not the task that kills workers."""
        self._posts.pop(post.place).handle.stop()
        if post.work is None:
            self._failed_starts += 1
            self._mourn(self._failed_starts, "while it started", error)
        else:
            post.work.deaths += 1
            self._mourn(post.work.deaths, self._where(post.work.task), error)
            self._queue.appendleft(post.work)
        self._start(post.place)

    def _mourn(self, deaths: int, where: str, error: Lost) -> None:
        if deaths > RETRIES:
            raise UserError(
                f"a worker process died {deaths} times {where} ({error}), perhaps for want of "
                "memory: start again with fewer --workers or a smaller --batch to go on; the rows "
                "so far are kept"
            ) from error
        self._progress.note(f"a worker process died {where}; another one takes over")

    def _where(self, task: Task) -> str:
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
