"""Meters against a driver that is made up, and without any."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvbench.efficiency import meters
from kvbench.efficiency.meters import DriverMeter, peak_memory
from kvbench.efficiency.nvml import Card, visible_device

GIB = 1 << 30


class Driver:
    """pynvml with two cards; `used` and `own` are bytes of the whole card and of this process."""

    def __init__(self) -> None:
        self.used, self.own, self.down = 3 * GIB, None, 0
        self.asked: list[object] = []
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise RuntimeError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.down += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        if index > 1:
            raise RuntimeError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        self.asked.append(name)
        return 1

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return ["NVIDIA H100 80GB HBM3", b"NVIDIA A100-SXM4-40GB"][handle]

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=self.used, total=80 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        others = [SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=9 * GIB)]
        return [*others, SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


def soon(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_the_card_less_what_was_used_before(driver: Driver) -> None:
    with DriverMeter() as meter:
        assert meter.now() == 0
        driver.used = 8 * GIB
        assert meter.now() == 5 * GIB
        driver.used = 4 * GIB
        assert meter.now() == GIB
    assert (meter.peak, meter.source) == (5 * GIB, "device")
    assert driver.down == 1


def test_the_process_where_the_driver_knows_it(driver: Driver) -> None:
    with DriverMeter() as meter:
        driver.used = 60 * GIB  # somebody else's
        soon(lambda: meter.peak == 57 * GIB)
        driver.own = 2 * GIB
        soon(lambda: meter.source == "process")
        driver.own = GIB
        assert meter.now() == GIB
    assert (meter.peak, meter.source) == (2 * GIB, "process")


def test_a_peak_right_before_the_end(driver: Driver) -> None:
    with DriverMeter() as meter:
        driver.used = 7 * GIB
    assert meter.peak == 4 * GIB


def test_without_driver_or_package(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.broken = True
    assert visible_device() is None
    with DriverMeter() as meter:
        assert meter.now() is None
    assert (meter.peak, meter.source) == (None, "")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert visible_device() is None


def test_the_cpu_has_no_meter(driver: Driver) -> None:
    with peak_memory(torch.device("cpu"), limit=1) as peak:
        pass
    assert peak.fields() == {"peak_nvml": None, "nvml_source": "", "peak_torch": None}


@pytest.mark.parametrize(
    ("shown", "device", "asked", "name"),
    [
        (None, "cuda", 0, "H100"),
        (None, "cuda:1", 1, "A100"),
        ("1", "cuda", 1, "A100"),
        ("1, 0", "cuda:1", 0, "H100"),
        ("GPU-4f", "cuda:0", "GPU-4f", "A100"),
        ("", "cuda", None, None),
        ("-1", "cuda", None, None),
        ("0", "cuda:1", None, None),
        (None, "cuda:2", 2, None),
        (None, "cpu", None, None),
    ],
)
def test_which_card(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, shown, device: str, asked, name
) -> None:
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    card = visible_device(device)
    assert driver.asked == ([] if asked is None else [asked])
    if name is None:
        assert card is None
    else:
        assert card is not None and name in card.name
        assert (card.memory, card.driver) == (80 * GIB, "570.1")


class Torch:
    """What a limit asks of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, driver: Driver, context: int) -> None:
        self.fraction = 1.0

        def load(device: str) -> None:
            driver.used += context

        def fraction(value: float, device: str) -> None:
            self.fraction = value

        monkeypatch.setattr(meters, "_load_libraries", load)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
        properties = SimpleNamespace(total_memory=80 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(meters, "torch_peak", lambda device: 77)


def test_a_limit_counts_the_context(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Torch(monkeypatch, driver, GIB)
    with peak_memory("cuda", 64 * GIB) as peak:
        assert fake.fraction == (64 * GIB - GIB - (256 << 20)) / (80 * GIB)
        driver.used += 62 * GIB
    expected = {"peak_nvml": 63 * GIB, "nvml_source": "device", "peak_torch": 77}
    assert peak.fields() == expected


def test_more_than_the_limit_is_out_of_memory(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    Torch(monkeypatch, driver, GIB)
    with pytest.raises(MemoryError, match="more than the limit"), peak_memory("cuda", 64 * GIB):
        driver.used += 64 * GIB
    with pytest.raises(MemoryError, match="context alone"), peak_memory("cuda", GIB):
        pass


def test_cards_are_equal_by_value(driver: Driver) -> None:
    assert visible_device() == Card("NVIDIA H100 80GB HBM3", 80 * GIB, "570.1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_real_card() -> None:
    card = visible_device()
    assert card is not None and card.name == torch.cuda.get_device_name()
    with peak_memory("cuda", None) as peak:
        block = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        assert (peak.driver.now() or 0) >= 1 << 30
        del block
    assert (peak.fields()["peak_nvml"] or 0) >= 1 << 30
    assert (peak.fields()["peak_torch"] or 0) >= 1 << 30
