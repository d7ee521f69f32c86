"""Power by a driver that is made up, and by a real one."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
import torch

from kvbench.efficiency import power
from kvbench.efficiency.power import Power, power_of


class Driver:
    """pynvml with one card; `energy` is in millijoule."""

    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.energy = 5_000

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return 7

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.energy

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return 1500

    def nvmlDeviceGetMaxClockInfo(self, handle: int, kind: int) -> int:
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return driver


def work_of(driver: Driver, monkeypatch: pytest.MonkeyPatch, seconds: float) -> Any:
    """Work that takes so long by the clock, and 1,000 J."""
    now = [3.0]
    monkeypatch.setattr(power.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += seconds
        driver.energy += 1_000_000

    return work


def test_mean_power(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    found = power_of(work_of(driver, monkeypatch, 2.5))
    assert found == Power(400.0, 700.0, 1500, 1980)
    assert str(found) == "400 of 700 W, 1,500 of 1,980 MHz"


def test_short_work_says_nothing(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert power_of(work_of(driver, monkeypatch, 0.9)) is None
    assert driver.energy == 1_005_000  # it ran


@pytest.mark.parametrize("missing", ["Init", "DeviceGetTotalEnergyConsumption"])
def test_what_the_driver_does_not_know(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delattr(Driver, f"nvml{missing}")
    assert power_of(work_of(driver, monkeypatch, 2.0)) is None
    assert driver.energy == 1_005_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_real_card() -> None:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    until = time.perf_counter() + 1.5

    def work() -> None:
        while time.perf_counter() < until:
            torch.mm(a, a)
            torch.cuda.synchronize()

    found = power_of(work)
    assert found is not None
    assert 50 < found.watts <= 1.1 * found.limit
    assert 0 < found.clock <= found.top_clock
