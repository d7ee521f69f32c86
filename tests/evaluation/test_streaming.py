"""Rows leave a worker as they are made: whoever dies in the middle of a job, they stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate
from kvbench.evaluation.store import SAMPLES, read_rows

pytestmark = pytest.mark.slow

Same = Callable[[Path, Path], None]
Running = Callable[[list[psutil.Process]], list[psutil.Process]]
HERE = Path(__file__).parent


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which workers can import too."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    import watched

    return watched


@pytest.fixture
def make(watched: Any, drawn: Path, tiny_llava_folder: Path, tmp_path: Path) -> Any:
    """A request of watched methods."""

    def make(**changes: Any) -> EvalRequest:
        made: EvalRequest = watched.request(str(tiny_llava_folder), str(drawn), tmp_path, **changes)
        return made

    return make


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_a_worker_dies_in_the_middle_of_a_job(
    watched: Any,
    make: Callable[..., EvalRequest],
    listener: Any,
    same_results: Same,
    still_running: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    executor: str,
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    request = make(executor=executor, workers=1, gpus_per_worker=1, batch=2)
    stored: list[tuple[str, int]] = []
    count = listener.advance

    def kill_then_open() -> None:
        count()
        if listener.advanced == 4:  # of six rows, while `patient` waits for the gate
            stored.extend((row.method, row.sample_id) for row in read_rows(request.out / SAMPLES))
            worker = psutil.Process(watched.answers(tmp_path)[0][1])
            worker.kill()
            assert not still_running([worker])
            (tmp_path / "open").touch()

    monkeypatch.setattr(listener, "advance", kill_then_open)
    evaluate(request, listener)
    evaluate(make(out=tmp_path / "calm", batch=2), Silent())

    first, second = dict.fromkeys(sample for _, sample in stored)
    assert stored == [(method, n) for method in ("fp16", "swift") for n in (first, second)]
    same_results(request.out, tmp_path / "calm")
    answered = Counter(name for name, pid in watched.answers(tmp_path) if pid != os.getpid())
    assert answered["swift"] == 1 and answered["patient"] in (1, 2)  # killed before or at work
    assert listener.total == listener.advanced == 6
    assert listener.cells == ["tiny · OE"]  # both workers said so
    assert listener.notes == [
        "a worker process died at samples 1 to 2 of oe with tiny; another one takes over"
    ]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_caller_is_stopped_in_the_middle_of_jobs(
    watched: Any,
    make: Callable[..., EvalRequest],
    listener: Any,
    same_results: Same,
    still_running: Running,
    drawn: Path,
    tiny_llava_folder: Path,
    tmp_path: Path,
    sent: signal.Signals,
) -> None:
    rows = tmp_path / "run" / SAMPLES
    caller = subprocess.Popen(
        [sys.executable, str(HERE / "watched.py"), tiny_llava_folder, drawn, tmp_path],
        stderr=subprocess.DEVNULL,
    )
    while caller.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    assert caller.poll() is None, "it gave up before its rows were in the store"
    family = psutil.Process(caller.pid).children(recursive=True)
    caller.send_signal(sent)
    assert caller.wait() != 0
    assert len(family) >= 2 and not still_running(family)
    assert Counter(row.method for row in read_rows(rows)) == {"fp16": 2, "swift": 2}

    (tmp_path / "open").touch()
    evaluate(make(), listener)  # one after the other: in which process is told by its pid
    again = [name for name, pid in watched.answers(tmp_path) if pid == os.getpid()]
    assert again == ["patient", "patient"]
    assert listener.total == listener.advanced == 6
    evaluate(make(out=tmp_path / "calm"), Silent())
    same_results(tmp_path / "run", tmp_path / "calm")
