"""What a card draws while it works. At its power limit its clock falls, and its rates with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvbench.efficiency.nvml import handle_of, opened, tried


@dataclass(frozen=True)
class Power:
    """Mean watts and their limit, the multiprocessors' clock near the end and its most, in MHz."""

    watts: float
    limit: float
    clock: int
    top_clock: int

    def __str__(self) -> str:
        """One phrase."""
        return f"{self.watts:.0f} of {self.limit:.0f} W, {self.clock:,} of {self.top_clock:,} MHz"


def power_of(work: Callable[[], object]) -> Power | None:
    """Run `work` to its end on CUDA and say what that drew; None where the driver doesn't.

    The driver counts energy some ten times a second: only work of a second or more counts.
    """
    with opened() as nvml:
        handle = None if nvml is None else handle_of(nvml, "cuda")
        before = tried(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))  # mJ
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()  # asks for it: the device has yet to do the last of it
        clock = tried(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        after = tried(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        limit = tried(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))  # mW
        top = tried(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    if seconds < 1 or None in (before, clock, after, limit, top):
        return None
    return Power((after - before) / 1e3 / seconds, limit / 1e3, clock, top)
