"""Workers as processes of this machine; with several GPUs, each process sees its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Self

from kvbench.errors import UserError
from kvbench.evaluation.hardware import wants_gpus
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.worker import Outcome, Setup, Task, Worker
from kvbench.models import AUTO_MAP

_VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalExecutor:
    """Starts `request.workers` processes, each with its share of the GPUs, round robin.

    Raises:
        UserError: a worker is to have more GPUs than there are.
    """

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, request: EvalRequest) -> None:
        """Look at the GPUs."""
        import torch

        self.workers = request.workers or 1
        self.threads: int | None = max(torch.get_num_threads() // self.workers, 1)
        self._shares = _shares(request, self.workers)

    def __enter__(self) -> Self:
        """Nothing runs yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing runs any more."""

    def start(self, setup: Setup, place: int) -> LocalWorker:
        """Start a process for a place from 0 to `workers` - 1."""
        return LocalWorker(setup, self._shares[place])


class LocalWorker:
    """A pool of one process: that one may die without harm to the others."""

    def __init__(self, setup: Setup, gpus: str | None) -> None:
        """Start the process; `gpus` is what it sees of them, None is everything."""
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _start, (setup, gpus))
        self.ready: Future[str] = self._pool.submit(_version)
        self._pid = self._pool.submit(os.getpid)
        self._last: Future[Outcome] | None = None

    def submit(self, task: Task) -> Future[Outcome]:
        """Give it a task."""
        self._last = self._pool.submit(_run, task)
        return self._last

    def stop(self) -> None:
        """End the process, in the middle of its task if it has one."""
        busy = self._last is not None and not self._last.done()
        if busy:
            with suppress(ProcessLookupError, BrokenProcessPool):
                os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(cancel_futures=True)


def _shares(request: EvalRequest, workers: int) -> list[str | None]:
    """By place, which GPUs a worker may see; None where there are none or the user chose one."""
    import torch

    count = torch.cuda.device_count() if wants_gpus(request.device) else 0
    if not count:
        return [None] * workers
    given = [name for name in os.environ.get(_VISIBLE, "").split(",") if name]
    names = given[:count] if given else [str(index) for index in range(count)]
    spread = max(count // workers, 1) if request.device == AUTO_MAP else 1
    size = request.gpus_per_worker or spread
    if size > count:
        raise UserError(f"--gpus-per-worker is {size}, but this machine has {count} GPUs")
    return [
        ",".join(names[(place * size + index) % count] for index in range(size))
        for place in range(workers)
    ]


_worker: Worker


def _start(setup: Setup, gpus: str | None) -> None:
    global _worker

    if gpus is not None:
        os.environ[_VISIBLE] = gpus  # read when CUDA is first used, which is later
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent speaks for all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = Worker(setup)


def _end_with_parent() -> None:
    """A parent that was killed can't tell its workers, which would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _version() -> str:
    return _worker.get_version()


def _run(task: Task) -> Outcome:
    return _worker.run(task)
