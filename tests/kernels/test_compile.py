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


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Of each module, how many kernels were compiled and which ones failed."""
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MODULES],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    parsed: dict[str, dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return parsed


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_kernels_compile_for_sm_80_and_sm_90(
    module: str, report: dict[str, dict[str, object]]
) -> None:
    assert not report[module]["failed"]


@pytest.mark.slow
def test_every_kind_of_kernel_is_among_them(report: dict[str, dict[str, object]]) -> None:
    for part in ("attention", "append", "decoder_ops", "dequantize", "hadamard", "quantize"):
        assert report[f"{part}_triton"]["compiled"], part
