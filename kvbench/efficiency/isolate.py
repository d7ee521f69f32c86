"""One try in a process of its own: whatever happens to it is a result, and its memory is gone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import kvbench
from kvbench.efficiency.request import TrialRequest, TrialResult

TRIAL = (sys.executable, "-m", "kvbench.efficiency.trial")
_TAIL = 4000  # characters of the log in which a reason is looked for
_LINE = 300
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation", re.I
)


def run_isolated(
    request: TrialRequest, timeout: float, log: Path, command: Sequence[str] = TRIAL
) -> TrialResult:
    """Run `command REQUEST.json RESULT.json` and read what it wrote.

    A crash, a hang and a death by signal come back as results too. Interrupted, it ends the process
    before the exception goes on.

    Args:
        request: What to try.
        timeout: Seconds.
        log: File that gets all that the process prints; replaced.
        command: The program and its first arguments.
    """
    with tempfile.TemporaryDirectory(prefix="kvbench-") as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        request.save(asked)
        code = _run([*command, str(asked), str(answer)], timeout, log)
        if code is None:
            return TrialResult("timeout", f"it had not ended after {timeout:.0f} s: see {log}")
        return _read(answer) or _death(code, log)


def _run(command: Sequence[str], timeout: float, log: Path) -> int | None:
    """The exit code, or None after a timeout; no process of the group is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    """Ours, with this very kvbench on the path: in a checkout it needn't be installed."""
    root = str(Path(kvbench.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _read(answer: Path) -> TrialResult | None:
    try:
        return TrialResult.from_json(json.loads(answer.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):  # no file, half of one, or no result
        return None


def _death(code: int, log: Path) -> TrialResult:
    """What a process died of that left no result."""
    tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    last = lines[-1][:_LINE] if lines else "it printed nothing"
    for line in reversed(lines):
        if _OUT_OF_MEMORY.search(line):
            return TrialResult("oom", line[:_LINE])
    if code < 0:
        name = signal.Signals(-code).name
        why = ", perhaps because the machine ran out of memory" if name == "SIGKILL" else ""
        return TrialResult("failed", f"it was killed by {name}{why}; last line: {last}")
    return TrialResult("failed", f"it ended with exit code {code}: {last}")
