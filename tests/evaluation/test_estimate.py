"""How long a grid takes, from rows whose seconds are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvbench
from kvbench.cli import app
from kvbench.errors import UserError
from kvbench.evaluation.estimate import Estimate, estimate_text, estimates
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.samples import Cell, read_cell
from kvbench.evaluation.store import Store

Make = Callable[..., SampleRow]


@pytest.fixture
def request_(grid: Callable[..., EvalRequest]) -> EvalRequest:
    """One model, two methods, two tasks of six samples."""
    return grid(methods="fp16,rtn_int2")


@pytest.fixture
def cells(request_: EvalRequest, drawn: Path) -> dict[str, Cell]:
    return {name: read_cell(name, drawn, None, 0) for name in request_.tasks}


@pytest.fixture
def row(make_row: Make, cells: dict[str, Cell]) -> Make:
    """A row of the grid that took so many seconds."""

    def make(method: str, task: str, sample: int, seconds: float, **more: Any) -> SampleRow:
        parts = {"prefill": seconds / 4, "decode": seconds * 3 / 4}
        fields: dict[str, Any] = {
            "method": method,
            "task": task,
            "sample_id": sample,
            "dataset": cells[task].dataset,
            "version": kvbench.__version__,
            "seconds": parts,
        }
        return make_row(**fields | more)

    return make


def test_medians_of_each_cell(request_: EvalRequest, cells: dict[str, Cell], row: Make) -> None:
    rows = [row("fp16", "oe", sample, seconds) for sample, seconds in enumerate((1, 2, 9))]
    rows += [row("fp16", "wqa", 0, 10), row("rtn_int2", "oe", 0, 100)]
    rows += [row("rtn_int2", "wqa", 5, 1000)]
    (found,) = estimates(request_, cells, rows)
    expected = 3 * 2 + 5 * 10 + 5 * 100 + 5 * 1000
    assert found == Estimate("tiny", 24, 18, 6, 0, expected)


def test_cells_without_samples_take_the_nearest(
    request_: EvalRequest, cells: dict[str, Cell], row: Make
) -> None:
    rows = [row("fp16", "oe", 0, 1), row("rtn_int2", "oe", 0, 3)]
    (found,) = estimates(request_, cells, rows)
    # WebQA of each method as that method's other task
    assert found == Estimate("tiny", 24, 22, 2, 12, 5 * 1 + 6 * 1 + 5 * 3 + 6 * 3)
    both = dataclasses.replace(request_, protocols=("quantized_prefill", "exact_prefill"))
    (found,) = estimates(both, cells, rows)
    assert (found.total, found.left, found.borrowed) == (48, 46, 36)
    assert found.seconds == 2 * (6 * 4 + 6 * 4) - 4


def test_rows_that_say_nothing(request_: EvalRequest, cells: dict[str, Cell], row: Make) -> None:
    others = [
        row("fp16", "oe", 1, 50, batch=2),
        row("fp16", "oe", 1, 50, status="oom"),
        row("fp16", "oe", 1, 50, dataset="other"),
        row("fp16", "oe", 1, 50, model="large"),
    ]
    with pytest.raises(UserError, match=r"tiny has no measured samples in .* with --limit 2"):
        estimates(request_, cells, others)
    old = row("fp16", "oe", 1, 7, version="0.0.1")  # measured, but to be answered again
    (found,) = estimates(request_, cells, [*others, old])
    assert found == Estimate("tiny", 24, 24, 1, 18, 24 * 7)


def test_verb(
    request_: EvalRequest, row: Make, tiny_llava_folder: Path, drawn: Path, tmp_path: Path
) -> None:
    words = f"eval --estimate --models tiny={tiny_llava_folder} --methods fp16,rtn_int2 --tasks oe"
    words += f" --data-root {drawn} --out {tmp_path / 'run'} --workers 2"
    empty = CliRunner().invoke(app, words.split())
    assert empty.exit_code == 2 and "name a folder that kvbench wrote" in empty.stderr
    with Store(tmp_path / "run") as store:
        store.append(row("rtn_int2", "oe", 0, 360))
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "tiny: 11 of 12 samples left, about 1.10 h from the medians of 1 measured samples; 6 of "
        "them where none was measured yet, as long as in the nearest cell",
        "all: about 1.10 h on one device, plus loading each model",
        "shared by 2 workers: about 0.55 h",
    ]
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_text() -> None:
    found = [Estimate("a", 100, 80, 20, 0, 7200), Estimate("b", 100, 100, 4, 60, 1800)]
    assert estimate_text(found, 1).splitlines() == [
        "a: 80 of 100 samples left, about 2.00 h from the medians of 20 measured samples",
        "b: 100 of 100 samples left, about 0.50 h from the medians of 4 measured samples; 60 of "
        "them where none was measured yet, as long as in the nearest cell",
        "all: about 2.50 h on one device, plus loading each model",
    ]
    assert estimate_text(found, 5).splitlines()[-1] == "shared by 5 workers: about 0.50 h"
