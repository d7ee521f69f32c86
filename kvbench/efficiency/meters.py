"""Peak memory of this process, as the driver and as torch count it; and a limit to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvbench.efficiency.nvml import handle_of, opened, process_bytes, tried

_INTERVAL = 0.01  # seconds; a prefill's allocations live longer
_PATIENCE = 10.0  # seconds for the driver to answer
RESERVE = 256 << 20
"""Bytes of a memory limit for kernels that are loaded only in the course of a run."""


class DriverMeter:
    """Peak device memory of this process by NVML, sampled every 10 ms in a thread.

    The driver counts what torch doesn't: the CUDA context, modules, libraries' workspaces, and
    memory that torch's allocator holds in reserve. Start it before CUDA is touched.

    Attributes:
        source: "process" where the driver gives this process's own memory; "device" where it
            doesn't (containers): all used on the card less what was used before; "" where NVML or
            the card is missing.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.source = ""
        self._device = device
        self._now = self._peak = 0
        self._before = 0
        self._stop = threading.Event()
        self._ticked = threading.Condition()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def peak(self) -> int | None:
        """Bytes, the most so far; None without a source."""
        return self._peak if self.source else None

    def now(self) -> int | None:
        """Bytes, from a sample taken after the call; None without a source."""
        with self._ticked:
            for _ in range(2):  # the sample under way may have begun before
                if self.source and self._thread.is_alive():
                    self._ticked.wait(_PATIENCE)
            return self._now if self.source else None

    def __enter__(self) -> DriverMeter:
        """Begin to sample."""
        with self._ticked:
            self._thread.start()
            self._ticked.wait(_PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        """Sample once more and end."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with opened() as nvml:
            handle = None if nvml is None else handle_of(nvml, self._device)
            if handle is not None:
                self._before = tried(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used) or 0
                self.source = "device"
            with self._ticked:
                self._ticked.notify_all()
            while self.source:
                last = self._stop.wait(_INTERVAL)
                self._sample(nvml, handle)
                if last:
                    return

    def _sample(self, nvml: Any, handle: Any) -> None:
        own = process_bytes(nvml, handle, os.getpid())
        if own and self.source == "device":
            self.source, self._peak = "process", 0
        if self.source == "device":
            used = tried(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used) or 0
            own = max(used - self._before, 0)
        with self._ticked:
            self._now = own or 0
            self._peak = max(self._peak, self._now)
            self._ticked.notify_all()


class MemoryPeaks:
    """Peaks of a block of code, and the names under which a result has them."""

    def __init__(self, driver: DriverMeter, device: str) -> None:
        self.driver = driver
        self._device = device

    def fields(self) -> dict[str, Any]:
        """Bytes by the driver and who counted, bytes of tensors by torch's allocator."""
        return {
            "peak_nvml": self.driver.peak,
            "nvml_source": self.driver.source,
            "peak_torch": torch_peak(self._device),
        }


@contextmanager
def peak_memory(device: Any, limit: int | None = None) -> Iterator[MemoryPeaks]:
    """Meter a block, and hold the process to `limit` bytes of device memory, its context included.

    torch's allocator gets what the driver's own needs leave of the limit. Without CUDA nothing is
    metered or limited.

    Args:
        device: A torch.device or its name.
        limit: Bytes; None: all that the card has.

    Raises:
        MemoryError: The context alone, or at the end all that the driver counted, exceeds `limit`.
    """
    name = str(device)
    with DriverMeter(name) as driver:
        if limit is not None and name.startswith("cuda"):
            _hold(name, limit, driver)
        yield MemoryPeaks(driver, name)
    if limit is not None and (driver.peak or 0) > limit:
        raise MemoryError(f"the process took {driver.peak} bytes, more than the limit of {limit}.")


def _hold(device: str, limit: int, driver: DriverMeter) -> None:
    """Give torch's allocator the rest of the limit, once the driver's share can be seen."""
    import torch

    _load_libraries(device)
    overhead = (driver.now() or 0) - torch.cuda.memory_reserved(device) + RESERVE
    total = torch.cuda.get_device_properties(device).total_memory
    if limit <= overhead:
        raise MemoryError(f"the CUDA context alone takes {overhead} of {limit} bytes.")
    # Unlike its neighbours, this function takes no device without a number.
    number = torch.device(device).index or 0
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - overhead) / total), number)


def _load_libraries(device: str) -> None:
    """Have cuBLAS, cuDNN and attention loaded: modules take memory that torch doesn't see."""
    import torch
    from torch.nn import functional

    x = torch.ones(1, 8, 64, 64, dtype=torch.float16, device=device)
    functional.scaled_dot_product_attention(x @ x, x, x)
    functional.conv2d(x, x.transpose(0, 1)[:, :, :14, :14].expand(8, 8, 14, 14))
    torch.cuda.synchronize(device)
    del x
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def torch_peak(device: str = "cuda") -> int | None:
    """Bytes that torch's allocator held for tensors at most; None on the CPU."""
    import torch

    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated(device)
