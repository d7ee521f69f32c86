"""Which code a method runs on: Triton kernels or plain torch, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from kvbench.doctor.findings import Finding, Status

if TYPE_CHECKING:
    from kvbench.cache import BoundMethod

SECTION = "kernels"
_PLAIN = "nothing for accuracy, which is the same; expect the speed of plain torch"


def triton(device: str) -> Iterator[Finding]:
    """Whether Triton kernels run on the device that is used."""
    import torch

    from kvbench.kernels.launch import why_not

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        yield Finding(SECTION, Status.FAIL, "triton", "torch: no CUDA device", "take --device cpu")
        return
    reason = why_not(torch.empty(0, device=device))
    if reason is None:
        yield Finding(SECTION, Status.OK, "triton", f"kernels run on {device}")
    elif device == "cpu":
        yield Finding(SECTION, Status.NOTE, "triton", f"torch: no CUDA device. {reason}", _PLAIN)
    else:
        yield Finding(SECTION, Status.NOTE, "triton", f"torch: {reason}", "run pip install triton")


def path(section: str, name: str, bound: BoundMethod) -> Finding:
    """What a decode step of the method runs on in `eval`, and in `efficiency`'s engine."""
    slow = _plain_torch(bound)
    engine = _no_engine(bound)
    text = (
        f"eval: {'Triton' if slow is None else f'torch, {slow}'}; "
        f"efficiency: {'fused decoder' if engine is None else f'eager, {engine}'}"
    )
    on_gpu = bound.model.device.type == "cuda"
    if on_gpu and (slow or engine):
        return Finding(section, Status.NOTE, name, text, _PLAIN)
    return Finding(section, Status.OK, name, text)


def _plain_torch(bound: BoundMethod) -> str | None:
    """Why attention decodes the cache with plain torch first; None where a kernel reads it."""
    import torch

    from kvbench.cache.fused import unfused
    from kvbench.kernels.launch import why_not

    if reason := why_not(torch.empty(0, device=bound.model.device)):
        return "no CUDA device" if bound.model.device.type == "cpu" else reason.rstrip(".")
    if any(spec.sliding_window is not None for spec in bound.specs):
        return "the model has attention windows"
    return next((reason for q in bound.quantizers if (reason := unfused(q))), None)


def _no_engine(bound: BoundMethod) -> str | None:
    """Why the efficiency engine has no static cache or fused decoder for it; None if it has."""
    from kvbench.efficiency.decoder import unsupported_model
    from kvbench.efficiency.support import unsupported
    from kvbench.efficiency.workload import Workload

    workload = Workload(input_tokens=1024, vision_tokens=576, output_tokens=64, batch=1)
    measured = replace(bound, protocol="exact_prefill")  # as the engine always runs
    return unsupported_model(bound.model) or unsupported(measured, workload)
