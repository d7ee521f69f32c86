"""Processors and accelerators, as torch sees them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

from kvbench.doctor.findings import Finding, Status

SECTION = "devices"
KERNELS_FROM = (8, 0)
"""Compute capability that the Triton kernels are written for, and above."""


def devices() -> Iterator[Finding]:
    """The processor, then each CUDA device, or why there is none."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{platform.machine()}, {cpus} cores, torch uses {torch.get_num_threads()} threads"
    yield Finding(SECTION, Status.OK, "cpu", text)
    driver = _driver()
    if not torch.cuda.is_available():
        yield _no_cuda(driver, torch.version.cuda)
        return
    yield Finding(
        SECTION, Status.OK, "driver", f"{driver or 'unknown'}, torch built for {torch.version.cuda}"
    )
    for index in range(torch.cuda.device_count()):
        yield _device(index)


def _no_cuda(driver: str | None, built_for: str | None) -> Finding:
    if driver is None:
        text, advice = (
            "torch: no CUDA device",
            "nothing for accuracy, which is the same here, only slow; speed needs an NVIDIA GPU",
        )
    elif built_for is None:
        text, advice = (
            f"there is a driver ({driver}), but torch is a build for CPUs",
            "install torch for CUDA: https://pytorch.org/get-started",
        )
    else:
        text, advice = (
            f"torch for CUDA {built_for} can't use the driver {driver}",
            "update the driver, or install torch for an older CUDA; see nvidia-smi",
        )
    return Finding(SECTION, Status.NOTE if driver is None else Status.FAIL, "cuda", text, advice)


def _device(index: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (properties.major, properties.minor)
    text = (
        f"{properties.name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free, "
        f"compute capability {properties.major}.{properties.minor}"
    )
    name = f"cuda:{index}"
    if capability < KERNELS_FROM:
        advice = "use a GPU of the Ampere generation or newer for speed; accuracy is the same"
        return Finding(SECTION, Status.NOTE, name, text, advice)
    if free < total / 2:
        advice = "end other processes on it (nvidia-smi) before measuring memory or speed"
        return Finding(SECTION, Status.NOTE, name, text, advice)
    return Finding(SECTION, Status.OK, name, text)


def _driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # pynvml missing, or any of its errors: no usable driver either way
        return None
    return version.decode() if isinstance(version, bytes) else str(version)
