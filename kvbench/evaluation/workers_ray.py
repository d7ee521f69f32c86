"""Workers as actors of a Ray cluster, wherever it has room; without a cluster, one of this machine.

Nodes read models and data from the same paths, and need no folder in common for results.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Self

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError

from kvbench.errors import UserError
from kvbench.evaluation.hardware import wants_gpus
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.worker import End, Lost, Message, Ready, Setup, Task, Worker
from kvbench.models import AUTO_MAP

_STORE_BYTES = 100 * 2**20
"""Shared memory of a cluster that is started here: rows and statistics are small."""
_LOST = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,  # a row was made, but its node died before it was fetched
    WorkerCrashedError,
)


class RayExecutor:
    """Starts actors with GPUs of their own, or on CPUs where the cluster has none.

    Raises:
        UserError: the cluster can't be reached or is too small.
    """

    def __init__(self, request: EvalRequest) -> None:
        """Nothing is started yet."""
        self._request = request
        self._owner = False

    def __enter__(self) -> Self:
        """Connect to the cluster, or start one that ends with this process."""
        self._owner = not ray.is_initialized()
        if self._owner:
            _connect(self._request)
        try:
            self._plan(ray.cluster_resources())
        except UserError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Let the cluster go; one that was started here ends."""
        if self._owner:
            ray.shutdown()

    def start(self, setup: Setup, place: int) -> RayWorker:
        """Start an actor; Ray chooses where."""
        actor = ray.remote(WorkerActor).options(
            num_cpus=1,
            num_gpus=self._gpus,
            max_restarts=0,
            runtime_env={"env_vars": {"HF_HUB_OFFLINE": "1"}},
        )
        return RayWorker(actor.remote(setup))

    def wait(self, channels: Sequence[Any], seconds: float | None) -> list[Any]:
        """One with a message or an error, if any."""
        ready: list[Any] = ray.wait(list(channels), timeout=seconds)[0]
        return ready

    def _plan(self, resources: dict[str, float]) -> None:
        """How many workers, with how much each."""
        request = self._request
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if gpus and request.device == AUTO_MAP and request.gpus_per_worker is None:
            raise UserError(
                f"--device {AUTO_MAP} on a cluster: say with --gpus-per-worker over how many GPUs "
                "of one machine a model is spread"
            )
        self._gpus = (request.gpus_per_worker or 1) if gpus and wants_gpus(request.device) else 0
        room = min(cpus, gpus // self._gpus if self._gpus else cpus)
        self.workers = request.workers or (room if self._gpus else 1)
        if self.workers > room or not room:
            raise UserError(
                f"the cluster has {cpus} CPUs and {gpus} GPUs, room for {room} workers and not "
                f"{max(self.workers, 1)}: give fewer --workers or --gpus-per-worker, or add nodes"
            )
        self.threads: int | None = max(cpus // self.workers, 1)


class WorkerActor:
    """A worker in a thread, and a queue of what it says; who asks for messages waits for them."""

    def __init__(self, setup: Setup) -> None:
        """One thread for all tasks: torch keeps handles and pools of threads for each."""
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1)
        self._worker = self._thread.submit(Worker, setup, self._messages.put).result()

    def submit(self, task: Task, arrived: frozenset[str]) -> None:
        """Begin a task."""
        self._thread.submit(self._worker.run, task, arrived)

    def message(self) -> Message:
        """The next message, once there is one."""
        return self._messages.get()


class RayWorker:
    """An actor, which is asked for one message after the other.

    Ray could stream them, but not to a caller outside of the cluster (``ray://``).
    """

    def __init__(self, actor: Any) -> None:
        """The actor is being started."""
        self._actor = actor
        self.channel: Any = actor.message.remote()

    def submit(self, task: Task, arrived: frozenset[str]) -> None:
        """Give it a task."""
        self._actor.submit.remote(task, arrived)
        self.channel = self._actor.message.remote()

    def receive(self) -> Message:
        """Its next message.

        Raises:
            Lost: its process or node is dead.
        """
        try:
            message: Message = ray.get(self.channel)
        except _LOST as error:
            raise Lost(_first_line(error)) from error
        if not isinstance(message, Ready | End):
            self.channel = self._actor.message.remote()
        return message

    def stop(self) -> None:
        """End the actor's process."""
        ray.kill(self._actor)


def _connect(request: EvalRequest) -> None:
    """Join the cluster at the address, else start one on this machine that nobody else can reach.

    Raises:
        UserError: there is no such cluster, or it has another Ray or Python.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = request.address or os.environ.get("RAY_ADDRESS") or None
    options: dict[str, Any] = {"address": address}
    if address is not None:
        _check_reachable(address)
    else:
        options = {
            "address": "local",
            "num_cpus": max(os.cpu_count() or 1, request.workers or 1),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _unusable(address, _first_line(error)) from error


def _check_reachable(address: str) -> None:
    """Ray itself goes on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # "auto" and the like: Ray looks for it on this machine
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _unusable(address, str(error)) from error


def _unusable(address: str | None, reason: str) -> UserError:
    where = f"Ray at {address}" if address else "Ray on this machine"
    return UserError(f"{where} can't be used ({reason}): see `ray status`, or give no --address")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
