"""Whatever a try's process does, a result comes back and nothing of it is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvbench.efficiency.isolate import run_isolated
from kvbench.efficiency.request import Runner, TrialRequest, TrialResult
from kvbench.efficiency.workload import Workload

REQUEST = TrialRequest("tiny", "fp16", Workload(600, 576, 512, 7), "engine", memory_limit=5)
ANSWERS = """
import json, sys
request = json.load(open(sys.argv[1]))
assert request["workload"]["batch"] == 7 and request["memory_limit"] == 5
print("working")
json.dump({"status": "ok", "tpot_s": [0.5, 0.25], "cache_bytes": 3}, open(sys.argv[2], "w"))
"""


def run(script: str, log: Path, timeout: float = 60) -> TrialResult:
    return run_isolated(REQUEST, timeout, log, (sys.executable, "-c", script))


def test_a_result_comes_back(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "try.log"
    result = run(ANSWERS, log)
    assert result == TrialResult("ok", tpot_s=(0.5, 0.25), cache_bytes=3)
    assert log.read_text() == "working\n"


def test_a_request_survives_the_way(tmp_path: Path) -> None:
    REQUEST.save(tmp_path / "request.json")
    assert TrialRequest.load(tmp_path / "request.json") == REQUEST


@pytest.mark.parametrize(
    ("script", "status", "parts"),
    [
        ("raise ValueError('no such layer')", "failed", ["exit code 1", "no such layer"]),
        ("import sys; sys.exit(3)", "failed", ["exit code 3", "printed nothing"]),
        ("pass", "failed", ["exit code 0"]),
        ("import os; print('there', flush=True); os.kill(os.getpid(), 11)", "failed",
         ["SIGSEGV", "there"]),
        ("import os; os.kill(os.getpid(), 9)", "failed", ["SIGKILL", "ran out of memory"]),
        ("raise RuntimeError('CUDA error: out of memory')", "oom", ["CUDA error"]),
        ("import os; print('CUBLAS_STATUS_ALLOC_FAILED', flush=True); os.abort()", "oom",
         ["CUBLAS"]),
        ("import sys; open(sys.argv[2], 'w').write('{\"status\": \"o')", "failed", ["code 0"]),
        ("import sys; open(sys.argv[2], 'w').write('[1]')", "failed", ["code 0"]),
        ("print('x' * 100000); raise SystemExit(1)", "failed", ["xxx"]),
    ],
)  # fmt: skip
def test_ends_without_a_result(tmp_path: Path, script: str, status: str, parts: list[str]) -> None:
    result = run(script, tmp_path / "log")
    assert result.status == status
    assert "\n" not in result.detail
    assert len(result.detail) < 500
    for part in parts:
        assert part in result.detail


HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({path!r}, "w").write(str(child.pid))
time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_a_hang_ends_with_all_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    result = run(HANGS.format(path=str(child)), tmp_path / "log", timeout=3)
    assert result.status == "timeout"
    assert "3 s" in result.detail and str(tmp_path / "log") in result.detail
    until = time.monotonic() + 10
    while not gone(int(child.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone(int(child.read_text()))


def test_an_interruption_ends_the_process_and_goes_on(tmp_path: Path) -> None:
    child, script = tmp_path / "child", tmp_path / "outer.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from tests_request import REQUEST\nfrom kvbench.efficiency.isolate import run_isolated\n"
        f"run_isolated(REQUEST, 60, Path({str(tmp_path / 'log')!r}), "
        f"(sys.executable, '-c', {HANGS.format(path=str(child))!r}))\n"
    )
    (tmp_path / "tests_request.py").write_text(
        "from kvbench.efficiency.request import TrialRequest\n"
        "from kvbench.efficiency.workload import Workload\n"
        "REQUEST = TrialRequest('tiny', 'fp16', Workload(2, 0, 2), 'engine')\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    outer = subprocess.Popen([sys.executable, script], env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 30
    while not (child.exists() and child.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    outer.send_signal(signal.SIGINT)
    _, errors = outer.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    until = time.monotonic() + 10
    while not gone(int(child.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone(int(child.read_text()))


@pytest.mark.slow  # two processes that import everything
@pytest.mark.parametrize(("method", "runner"), [("akvq_vl", "engine"), ("hf_dynamic", "generate")])
def test_a_real_try(tiny_llava_folder: Path, tmp_path: Path, method: str, runner: Runner) -> None:
    request = TrialRequest(
        f"tiny={tiny_llava_folder}",
        method,
        Workload(40, 16, 6, 3),
        runner,
        device="cpu",
        dtype="float32",
        memory_limit=1 << 40,
    )
    result = run_isolated(request, 120, tmp_path / "log")
    assert (result.status, result.detail) == ("ok", ""), (tmp_path / "log").read_text()
    assert (result.weights, len(result.tpot_s)) == ("real", 5)
    assert result.cache_bytes and result.total_s and result.bytes_per_step


@pytest.mark.slow
def test_a_real_try_of_what_is_not_there(tmp_path: Path) -> None:
    request = TrialRequest("llava15_7", "fp16", Workload(40, 0, 6), "engine", device="cpu")
    result = run_isolated(request, 120, tmp_path / "log")
    assert result.status == "failed"
    assert "did you mean llava15_7b" in result.detail
