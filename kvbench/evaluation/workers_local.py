"""Workers as processes of this machine; with several GPUs, each process sees its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Self

from kvbench.errors import UserError
from kvbench.evaluation.hardware import wants_gpus
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.worker import End, Lost, Message, Ready, Setup, Task, Worker
from kvbench.models import AUTO_MAP

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DEATH_SECONDS = 10.0
"""How long a process may take to end after its pipe has."""


class LocalExecutor:
    """Starts `request.workers` processes, each with its share of the GPUs, round robin.

    Raises:
        UserError: a worker is to have more GPUs than there are.
    """

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

    def wait(self, channels: Sequence[Any], seconds: float | None) -> list[Any]:
        """Those with a message or the end of their process."""
        return connection.wait(channels, seconds)


class LocalWorker:
    """A process and a pipe of its own, so that it may die in mid-sentence without harm to others.

    What it had written into the pipe can be read when it is dead.
    """

    def __init__(self, setup: Setup, gpus: str | None) -> None:
        """Start the process; `gpus` is what it sees of them, None is everything."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._connection, self._busy = ours, True
        self._process = context.Process(target=_serve, args=(theirs, gpus))
        self._process.start()
        theirs.close()  # so that the pipe ends when the process does
        self._send(setup)

    @property
    def channel(self) -> Connection:
        """Our end of the pipe."""
        return self._connection

    def submit(self, task: Task, arrived: frozenset[str]) -> None:
        """Give it a task."""
        self._busy = True
        self._send((task, arrived))

    def receive(self) -> Message:
        """Its next message.

        Raises:
            Lost: its pipe has ended.
        """
        try:
            message: Message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise Lost(self._cause()) from error
        self._busy = not isinstance(message, Ready | End)
        return message

    def stop(self) -> None:
        """End the process, in the middle of its task if it has one."""
        if self._busy:
            self._process.kill()
        self._connection.close()  # an idle one reads its end
        self._process.join()

    def _send(self, what: Setup | tuple[Task, frozenset[str]]) -> None:
        with suppress(OSError):  # it is dead, as `receive` will say
            self._connection.send(what)

    def _cause(self) -> str:
        self._process.join(_DEATH_SECONDS)
        code = self._process.exitcode
        return f"killed by signal {-code}" if code and code < 0 else f"exit code {code}"


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


def _serve(ours: Connection, gpus: str | None) -> None:
    """Run tasks until the caller closes its end."""
    if gpus is not None:
        os.environ[_VISIBLE] = gpus  # read when CUDA is first used, which is later
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C the parent speaks for all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        worker = Worker(ours.recv(), ours.send)
        while True:
            worker.run(*ours.recv())


def _end_with_parent() -> None:
    """A parent that was killed can't tell a worker that is in the middle of a task."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
