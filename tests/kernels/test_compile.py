"""All kernels, compiled for real GPUs without having one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(file.stem for file in (ROOT / "kernels").glob("*_triton.py"))
HALVES = [
    [name for name in MODULES if name.startswith("attention")],
    [name for name in MODULES if not name.startswith("attention")],
]
NOT_EMPTY = {"attention", "append", "decoder_ops", "dequantize", "hadamard", "quantize"}
# The interpreter is for whole processes, hence another one. It prints what failed, by module.
PROGRAM = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def source(kernel, types, constants):
    types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return ASTSource(fn=kernel, signature=types, constexprs=constants)

report = {}
for name in sys.argv[1:]:
    module = importlib.import_module(f"kvbench.kernels.{name}")
    report[name] = {"compiled": 0, "failed": []}
    for kernel, types, constants, warps in getattr(module, "compile_examples", list)():
        for capability in (80, 90):
            target = GPUTarget("cuda", capability, 32)
            options = {"num_warps": warps, "enable_fp_fusion": False}
            try:
                done = triton.compile(source(kernel, types, constants), target, options)
                assert done.asm["cubin"]
                report[name]["compiled"] += 1
            except Exception as error:
                reason = f"{kernel.__name__} for sm_{capability}: {str(error)[-600:]}"
                report[name]["failed"].append(reason)
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.parametrize("modules", HALVES, ids=["attention", "others"])
def test_kernels_compile_for_sm_80_and_sm_90(modules: list[str], tmp_path: Path) -> None:
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert not [reason for found in report.values() for reason in found["failed"]]
    compiled = {name.removesuffix("_triton") for name in modules if report[name]["compiled"]}
    assert compiled >= {name for name in NOT_EMPTY if f"{name}_triton" in modules}


def test_every_kind_of_kernel_is_among_them() -> None:
    assert {f"{part}_triton" for part in NOT_EMPTY} <= set(MODULES)
