"""A run that is cut short anywhere and started again ends as one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.evaluation import runner
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.store import read_rows
from kvbench.report import write_report

Evaluated = Callable[..., list[SampleRow]]
GRID: dict[str, Any] = {
    "methods": "fp16,rtn_int2,akvq_vl[recent=64]",
    "protocols": ("quantized_prefill", "exact_prefill"),
    "limit": 3,
}


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the size of the batch whenever a batch is answered."""
    calls: list[int] = []
    answer = runner.answer

    def counted(model: Any, inputs: Any, *more: Any) -> Any:
        calls.append(inputs.input_ids.shape[0])
        return answer(model, inputs, *more)

    monkeypatch.setattr(runner, "answer", counted)
    return calls


def by_key(rows: list[SampleRow]) -> dict[str, dict[str, Any]]:
    """Rows by key, without the time they took; no key twice."""
    found = {row.key: {**vars(row), "seconds": None} for row in rows}
    assert len(found) == len(rows)
    return found


def tables(folder: Path) -> dict[str, bytes]:
    """The tables of a folder of results."""
    return {path.name: path.read_bytes() for path in write_report(folder)}


def test_what_is_there_is_not_answered_again(
    evaluated: Evaluated, listener: Any, generations: list[int]
) -> None:
    first = evaluated(**GRID)
    assert sum(generations) == len(first) == 3 * 2 * 2 * 3
    generations.clear()
    assert evaluated(listener, **GRID) == first
    assert generations == []
    assert listener.advanced == listener.total == len(first)


@pytest.mark.parametrize(("batch", "seed"), [(1, 0), (2, 1), (3, 2)])
def test_lost_rows_come_back_as_they_were(
    evaluated: Evaluated, tmp_path: Path, generations: list[int], batch: int, seed: int
) -> None:
    calm = evaluated(**GRID, batch=batch, out=tmp_path / "run")
    before = tables(tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lost = set(random.Random(seed).sample(range(len(lines)), 7))
    kept = [line for place, line in enumerate(lines) if place not in lost]
    path.write_text("".join(kept))

    generations.clear()
    rows = evaluated(**GRID, batch=batch, out=tmp_path / "run")
    assert path.read_text().startswith("".join(kept))
    assert {row.key for row in rows[len(kept) :]} == {calm[place].key for place in lost}
    assert by_key(rows) == by_key(calm)
    assert tables(tmp_path / "run") == before
    if batch == 1:
        quantized = sum(calm[place].method != "fp16" for place in lost)
        assert 7 <= len(generations) <= 7 + quantized  # 16 bits once more, to compare with


def test_methods_that_come_later_are_compared_too(evaluated: Evaluated, tmp_path: Path) -> None:
    evaluated(**GRID | {"methods": "fp16"}, batch=2)
    evaluated(**GRID | {"methods": "rtn_int2,fp16"}, batch=2)
    rows = evaluated(**GRID, batch=2)
    calm = evaluated(**GRID, batch=2, out=tmp_path / "calm")
    assert by_key(rows) == by_key(calm)
    for row in rows:
        compared = (row.kl_first, row.kl_mean, row.agrees)
        assert (None in compared) is (row.method == "fp16")


def test_a_larger_limit_adds_samples(evaluated: Evaluated, generations: list[int]) -> None:
    evaluated(methods="fp16,rtn_int2", limit=4)
    generations.clear()
    rows = evaluated(methods="fp16,rtn_int2")
    assert len(rows) == 2 * 2 * 6
    assert len(generations) >= 2 * 2 * 2
    assert len(by_key(rows)) == len(rows)


def test_an_interrupted_batch_keeps_what_was_answered(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer, left = runner.answer, [8]

    def interrupted(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return answer(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluated(**GRID)
    assert len(read_rows(tmp_path / "run" / "samples.jsonl")) == 8
    rows = evaluated(**GRID)
    assert by_key(rows) == by_key(evaluated(**GRID, out=tmp_path / "calm"))


@pytest.mark.slow
def test_killed_at_any_moment(
    drawn: Path, tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", "--methods", "fp16,rtn_int2,smoothquant,akvq_vl[recent=64]"]
    words += ["--models", f"tiny={tiny_llava_folder}", "--tasks", "oe,wqa", "--protocol", "both"]
    words += ["--data-root", str(drawn), "--out", "run", "--device", "cpu"]
    words += ["--max-new-tokens", "6", "--batch", "2", "--calibration-samples", "2"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))

    def start(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "kvbench", *words],
            cwd=tmp_path / name,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    total, kills = 4 * 2 * 2 * 6, random.Random(0)
    path = tmp_path / "torn" / "run" / "samples.jsonl"
    calm, size = start("calm"), 0
    for _ in range(3):
        process = start("torn")
        enough = size + kills.randrange(1, 4000)
        while process.poll() is None and (path.stat().st_size if path.exists() else 0) < enough:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        size = path.stat().st_size
    assert len(read_rows(path)) < total
    assert start("torn").wait() == calm.wait() == 0
    rows, undisturbed = read_rows(path), read_rows(tmp_path / "calm" / "run" / "samples.jsonl")
    assert len(undisturbed) == total
    assert by_key(rows) == by_key(undisturbed)
    for name in ("table2.md", "table2.csv", "details.md", "details.csv"):
        torn, whole = (tmp_path / side / "run" / name for side in ("torn", "calm"))
        assert torn.read_bytes() == whole.read_bytes()
