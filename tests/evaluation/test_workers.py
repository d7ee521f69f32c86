"""A grid in several processes: the same rows, and nothing lost or left when something breaks."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.errors import UserError
from kvbench.evaluation.choices import MethodChoice
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.session import Job
from kvbench.evaluation.store import Store, read_rows
from kvbench.evaluation.workers import RETRIES, run_jobs

pytestmark = pytest.mark.slow

Same = Callable[[Path, Path], None]
Killer = Callable[[str, int], Any]
Running = Callable[[list[psutil.Process]], list[psutil.Process]]
Grid = Callable[..., EvalRequest]
Evaluated = Callable[..., list[SampleRow]]

AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")
DEADLY = """
import os
from dataclasses import dataclass
from kvbench.cache import Needs

@dataclass(frozen=True)
class Deadly:
    needs = Needs()
    label = "deadly"

    def layer(self, spec, calibration):
        os._exit(9)
"""


def test_two_processes_write_the_same_rows(
    evaluated: Evaluated, same_results: Same, listener: Any, private_cache: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"methods": "fp16,rtn_int2,smoothquant", "batch": 2}
    calm = evaluated(**options, tasks="oe", out=tmp_path / "run")
    rows = evaluated(listener, **options, workers=2, out=tmp_path / "run")
    assert rows[: len(calm)] == calm  # what was there is left alone
    evaluated(**options, out=tmp_path / "one")
    same_results(tmp_path / "run", tmp_path / "one")
    assert listener.total == listener.advanced == len(rows) == 3 * 2 * 6
    assert sorted(listener.cells) == ["tiny · OE", "tiny · WQA"]
    assert listener.notes == []  # the statistics of the first run serve the second


def test_a_killed_process_costs_nothing(
    evaluated: Evaluated,
    same_results: Same,
    still_running: Running,
    killer: Killer,
    private_cache: Path,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"methods": "fp16,rtn_int2,smoothquant", "max_new_tokens": 16}
    listener = killer("spawn_main", 7)
    rows = evaluated(listener, **options, workers=2, out=tmp_path / "run")
    assert listener.killed
    evaluated(**options, out=tmp_path / "one")
    same_results(tmp_path / "run", tmp_path / "one")
    assert listener.total == listener.advanced == len(rows) == 3 * 2 * 6
    calibrating, died = listener.notes
    assert calibrating.startswith("calibrating tiny for smoothquant on 3 samples")
    assert died.startswith("a worker process died at samples ")
    assert len(listener.workers) == 2 and not still_running(listener.workers)


def test_a_fault_in_a_worker_keeps_the_rows_before_it(
    grid: Grid, listener: Any, drawn: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(drawn, root)
    request = grid(data_root=root, methods="fp16,rtn_int2", tasks="oe")
    broken = next((root / "ObjectExistence" / "images").glob("4_*"))
    broken.write_bytes(b"no image")
    jobs = [Job(0, "oe", start, start + 1) for start in range(6)]
    with (
        Store(request.out) as store,
        pytest.raises(UserError, match=f"{broken.name}: not an image"),
    ):
        run_jobs(request, jobs, store, listener)
    rows = read_rows(request.out / "samples.jsonl")
    assert {row.sample_id for row in rows} == {0, 1, 2, 3}
    assert listener.advanced == len(rows) == 8


def test_a_task_that_kills_workers_ends_the_run(
    grid: Grid, listener: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_method.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    import deadly_method  # type: ignore[import-not-found]

    request = grid(tasks="oe", limit=1)
    methods = (MethodChoice("deadly", deadly_method.Deadly()),)
    request = dataclasses.replace(request, methods=methods)
    said = r"died 3 times at samples 1 to 1 of oe with tiny .*; the rows so far are kept"
    with Store(request.out) as store, pytest.raises(UserError, match=said):
        run_jobs(request, [Job(0, "oe", 0, 1)], store, listener)
    again = "a worker process died at samples 1 to 1 of oe with tiny; another one takes over"
    assert listener.notes == [again] * RETRIES
    assert read_rows(request.out / "samples.jsonl") == []


@pytest.mark.parametrize("executor", ["local", "ray"])
def test_workers_end_with_a_parent_that_was_killed(
    drawn: Path,
    tiny_llava_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    still_running: Running,
    executor: str,
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    words = f"eval --models tiny={tiny_llava_folder} --tasks oe --executor {executor} --workers 2"
    words += f" --data-root {drawn} --out run --device cpu --max-new-tokens 400 --methods fp16"
    parent = subprocess.Popen(
        [sys.executable, "-m", "kvbench", *words.split()],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    rows = tmp_path / "run" / "samples.jsonl"
    while parent.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    started = psutil.Process(parent.pid).children(recursive=True)
    # Ray's own agents take a minute to notice that their cluster is gone.
    children = [child for child in started if not child.name().startswith(AGENTS)]
    assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(children) >= 2 and not still_running(children)
