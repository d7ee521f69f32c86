"""What the device can do at most: measured in the process whose rows are held against it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

_COPY_BYTES = 2**30
_ORDER = 8192
_REPEATS = 10


@dataclass(frozen=True)
class Ceilings:
    """A device's name, and its limits in bytes and FLOP a second."""

    device: str
    copy_bandwidth: float
    matmul_rate: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.device}: copy {self.copy_bandwidth / 1e12:.2f} TB/s read and written, "
            f"float16 matmul {self.matmul_rate / 1e12:.0f} TFLOP/s"
        )


def ceilings(device: torch.device) -> Ceilings:
    """Measure a CUDA device, in float16."""
    name = torch.cuda.get_device_name(device)
    return Ceilings(name, copy_bandwidth(device), matmul_rate(device, torch.float16))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the median of some."""
    source = torch.randint(0, 255, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices, the median of some."""
    a, b = (torch.randn(_ORDER, _ORDER, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _ORDER**3 / _median_seconds(lambda: torch.mm(a, b, out=out))


def _median_seconds(work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    seconds = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
