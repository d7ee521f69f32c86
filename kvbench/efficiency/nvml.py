"""What NVIDIA's driver says of a card, without touching CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Card:
    """A GPU as the driver sees it; memory in bytes, and the driver's version."""

    name: str
    memory: int
    driver: str = ""


def visible_device(device: str = "cuda") -> Card | None:
    """The card that CUDA would use, without touching CUDA; None without card or driver."""
    with opened() as nvml:
        handle = None if nvml is None else handle_of(nvml, device)
        if handle is None:
            return None
        memory = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        name, driver = nvml.nvmlDeviceGetName(handle), nvml.nvmlSystemGetDriverVersion()
        return Card(_text(name), memory, _text(driver))


@contextmanager
def opened() -> Iterator[Any]:
    """The library, or None where it is missing or finds no driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # the package raises its own errors, ctypes OSError
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def handle_of(nvml: Any, device: str) -> Any:
    """NVML counts all cards, CUDA those in CUDA_VISIBLE_DEVICES. None for what is no such card."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    index, shown = int(number or 0), os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return tried(lambda: nvml.nvmlDeviceGetHandleByIndex(index))
    names = [name.strip() for name in shown.split(",")]
    if index >= len(names) or names[index] in ("", "-1"):
        return None
    if names[index].isdigit():
        return tried(lambda: nvml.nvmlDeviceGetHandleByIndex(int(names[index])))
    return tried(lambda: nvml.nvmlDeviceGetHandleByUUID(names[index]))


def process_bytes(nvml: Any, handle: Any, pid: int) -> int | None:
    """In a container the driver may list other numbers, or nothing."""
    found = tried(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return next((process.usedGpuMemory for process in found if process.pid == pid), None)


def tried(call: Callable[[], Any]) -> Any:
    """What the driver answers; None where it can't."""
    try:
        return call()
    except Exception:  # NVMLError is no class that a missing package would have
        return None


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
