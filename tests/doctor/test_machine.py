"""Versions, devices, kernels, disks, models and data."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import bind
from kvbench.doctor import Finding, Status, devices, disk, kernels, supplies
from kvbench.doctor.versions import versions
from kvbench.errors import UserError
from kvbench.kernels import launch
from kvbench.registry import MODELS, TASKS
from kvbench.tasks import minimile

Usage = namedtuple("Usage", "total used free")


def by_name(findings: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "numpy", "no-such-package<2", 'hqq; extra == "peers"', "rich>=1"]
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    found = by_name(versions())
    assert f"torch {metadata.version('torch')}" in found["installed"].text
    assert found["torch"].advice == "run pip install 'torch>=99'"
    assert found["no-such-package"].text == "is missing, kvbench needs <2"
    assert {name for name, f in found.items() if f.status == Status.FAIL} == {
        "torch",
        "no-such-package",
    }


@pytest.mark.parametrize(
    ("driver", "built_for", "status", "part"),
    [
        (None, None, Status.NOTE, "torch: no CUDA device"),
        ("580.1", None, Status.FAIL, "torch is a build for CPUs"),
        ("470.1", "13.0", Status.FAIL, "can't use the driver 470.1"),
    ],
)
def test_no_cuda(
    monkeypatch: pytest.MonkeyPatch,
    driver: str | None,
    built_for: str | None,
    status: Status,
    part: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(devices, "_driver", lambda: driver)
    finding = by_name(devices.devices())["cuda"]
    assert finding.status == status
    assert part in finding.text


@pytest.mark.parametrize(
    ("capability", "free", "status"),
    [((9, 0), 70, Status.OK), ((7, 5), 70, Status.NOTE), ((9, 0), 10, Status.NOTE)],
)
def test_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: int, status: Status
) -> None:
    properties = namedtuple("Properties", "name major minor")("Some GPU", *capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free << 30, 80 << 30))
    finding = by_name(devices.devices())["cuda:0"]
    assert finding.status == status
    assert finding.text.startswith(f"Some GPU, 80.0 GiB, {free}.0 GiB free")


def test_triton_on_the_cpu() -> None:
    (finding,) = kernels.triton("cpu")
    assert finding.status == Status.NOTE
    assert finding.text.startswith("torch: no CUDA device")


def test_a_cuda_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = kernels.triton("cuda:1")
    assert finding.status == Status.FAIL


@pytest.mark.parametrize(
    ("method", "protocol", "text"),
    [
        ("rtn_int2", "exact_prefill", "eval: Triton; efficiency: fused decoder"),
        ("kivi", "exact_prefill", "eval: Triton; efficiency: fused decoder"),
        ("kivi", "quantized_prefill", "eval: Triton; efficiency: fused decoder"),
        ("rtn_int2[group_over_heads=true]", "exact_prefill", "heads are stored together"),
    ],
)
def test_paths_where_kernels_run(
    monkeypatch: pytest.MonkeyPatch, tiny_text_model: Any, method: str, protocol: Any, text: str
) -> None:
    monkeypatch.setattr(launch, "why_not", lambda x: None)
    bound = bind(tiny_text_model().model, method, protocol=protocol)
    finding = kernels.path("kernels", method, bound)
    assert text in finding.text


def test_paths_on_the_cpu(tiny_text_model: Any) -> None:
    finding = kernels.path("kernels", "kivi", bind(tiny_text_model().model, "kivi"))
    assert finding.text.startswith("eval: torch, no CUDA device;")


@pytest.mark.parametrize(
    ("gigabytes", "status"), [(50, Status.OK), (5, Status.NOTE), (0.5, Status.FAIL)]
)
def test_disk(monkeypatch: pytest.MonkeyPatch, gigabytes: float, status: Status) -> None:
    free = int(gigabytes * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free))
    found = by_name(disk.disks())
    assert {finding.status for finding in found.values()} == {status}
    assert set(found) == {"results", "kvbench's cache", "checkpoints"}


def test_models(tmp_path: Path) -> None:
    found = by_name(supplies.models(None))
    assert list(found) == MODELS.names()
    assert found["smol_llava"].status == Status.OK
    assert "hf download" in found["llava15_7b"].advice


def test_data(tmp_path: Path) -> None:
    root = tmp_path / "data"
    minimile.make(root, samples=2, folders=("ObjectExistence", "WebQA"))
    (root / "WebQA" / "WebQA.json").write_text("{}")
    found = by_name(supplies.data(root))
    assert list(found) == TASKS.names()
    assert (found["oe"].status, found["oe"].text) == (Status.OK, "2 samples, minimile-1-seed0")
    assert found["wqa"].status == Status.FAIL
    assert found["st"].status == Status.NOTE
    assert "leave st out of --tasks" in found["st"].advice


@pytest.mark.parametrize("look", [supplies.data, supplies.models])
def test_broken_plugins_are_findings(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Any], Any]
) -> None:
    registry = TASKS if look is supplies.data else MODELS

    def broken(name: str) -> Any:
        raise UserError("repair it")

    monkeypatch.setattr(registry, "names", lambda: ["bad"])
    monkeypatch.setattr(registry, "get", broken)
    (finding,) = look(None)
    assert (finding.status, finding.advice) == (Status.FAIL, "repair it")
