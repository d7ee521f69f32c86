"""Which methods the decode kernel and the static cache can serve, and why not the others."""

from __future__ import annotations

import pytest

from kvbench.cache import bind
from kvbench.cache.fused import unfused
from kvbench.efficiency.support import unsupported
from kvbench.efficiency.workload import Workload

KERNEL_READS = "none that kernels read"
PATHS: dict[str, tuple[str | None, str | None]] = {
    "quarot_kv": (None, None),
    "oscar[sinks=0]": (None, "can't write it"),
    "fp8": (KERNEL_READS, KERNEL_READS),
    "nvfp4[static=1.0]": (KERNEL_READS, KERNEL_READS),
    "turboquant_4bit_nc[skip_layers=0]": (KERNEL_READS, KERNEL_READS),
    "rtn_int4[bits=3]": (KERNEL_READS, KERNEL_READS),
    "rotatekv": ("before rotary embedding", "before rotary embedding"),
    "vidkv[group_size=8,residual=16]": (KERNEL_READS, "depends on the prompt"),
    "calibquant": ("logits", "logits"),
    "calibquant[calibrate=false]": (KERNEL_READS, KERNEL_READS),
}


@pytest.mark.parametrize(("name", "reasons"), PATHS.items())
def test_kernels_serve_a_method_or_say_why_not(
    tiny_text_model, calibrated, name: str, reasons: tuple[str | None, str | None]
) -> None:
    model = tiny_text_model().model
    bound = bind(model, name, protocol="exact_prefill", calibration=calibrated(model))
    found = (unfused(bound.quantizers[0]), unsupported(bound, Workload(40, 0, 8)))
    for mine, expected in zip(found, reasons, strict=True):
        assert (mine is None) if expected is None else (mine is not None and expected in mine)
