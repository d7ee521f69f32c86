"""A setting of the paper's to make rows of."""

from __future__ import annotations

from kvbench.efficiency.rows import Setting

SETTING = Setting(
    model="llava15_7b",
    model_label="LLaVA-v1.5-7B",
    revision="random",
    method="fp16",
    label="FP16",
    runner="engine",
    protocol="exact_prefill",
    dtype="float16",
    input_tokens=600,
    vision_tokens=576,
    output_tokens=512,
    fixed_batch=None,
    prefill_rows=8,
    seed=0,
    gpu="v100",
    gpu_label="4 x V100 16 GB",
    memory="emulated",
    memory_limit=64 << 30,
    device="NVIDIA H100 80GB HBM3",
    code="c0de",
    versions={"torch": "2.11", "optimum-quanto": None},
)
