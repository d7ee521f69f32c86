"""Sweeps as typed and by name, and runs that share a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.analysis.ablate import SWEEPS, ablate
from kvbench.analysis.sweeps import choose_sweeps
from kvbench.errors import UserError
from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.store import SAMPLES, read_rows
from kvbench.report.ablation import ablation_summary, write_ablation


def specs(text: str) -> list[str]:
    (sweep,) = choose_sweeps([text])
    return [point.choice.spec for point in sweep.points]


def test_values_of_a_field() -> None:
    assert specs("akvq_vl.recent=0,32,128") == [
        "akvq_vl[recent=0]",
        "akvq_vl[recent=32]",
        "akvq_vl",
    ]
    assert specs("akvq_vl[clip=0.7,pivots=5].recent=16") == ["akvq_vl[clip=0.7,pivots=5,recent=16]"]
    assert specs("rtn_int2.clip=0.5,1.0") == ["rtn_int2[clip=0.5]", "rtn_int2"]
    (sweep,) = choose_sweeps(["akvq_vl.recent=0,32"])
    assert (sweep.field, [point.label for point in sweep.points]) == ("recent", ["0", "32"])


def test_the_papers_sweeps() -> None:
    assert specs("table3") == ["rtn_int2", "rtn_int2_wht", "rtn_int2_wht_tsa", "akvq_vl"]
    names = [sweep.name for sweep in choose_sweeps(["figure8"])]
    assert names == ["figure8a", "figure8b", "figure8c", "figure8d"]
    everything = choose_sweeps(["paper", "figure8c", "rtn_int4.bits=4,8"])
    assert [sweep.name for sweep in everything] == ["table3", *names, "rtn_int4.bits"]
    assert everything[0].tasks == ("st",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tabel3", "table3"),
        ("akvq_vl.recent", "method.field=value"),
        ("akvq_vl.recnt=1", "recent"),
        ("akvq_vl.recent=x", "whole number"),
        ("akvq.recent=1", "akvq_vl"),
        ("akvq_vl.recent=1,,2", "empty"),
    ],
)
def test_bad_sweeps(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        choose_sweeps([text])


@pytest.fixture
def request_of(data: Path, tiny_llava_folder: Path, tmp_path: Path) -> Callable[..., EvalRequest]:
    def make(tasks: str) -> EvalRequest:
        return EvalRequest(
            methods=choices.choose_methods("fp16"),
            models=choices.choose_models(f"tiny={tiny_llava_folder}"),
            tasks=choices.choose_tasks(tasks),
            protocols=("quantized_prefill",),
            out=tmp_path / "run",
            data_root=data,
            device="cpu",
            max_new_tokens=2,
        )

    return make


class Counting(Silent):
    def __init__(self) -> None:
        self.cells: list[str] = []

    def cell(self, label: str) -> None:
        self.cells.append(label)


def test_points_in_the_store_are_not_run_again(
    request_of: Callable[..., EvalRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvbench.evaluation import runner

    runs: list[Any] = []
    real = runner.answer
    monkeypatch.setattr(runner, "answer", lambda *a, **k: (runs.append(1), real(*a, **k))[1])
    request = request_of("wqa")
    ablate(choose_sweeps(["akvq_vl.recent=8,16"]), request, False, Silent())
    assert len(runs) == 2 * 3  # two samples, two points and the 16-bit cache
    runs.clear()
    ablate(choose_sweeps(["akvq_vl.recent=8,16"]), request, False, Silent())
    assert not runs
    ablate(choose_sweeps(["akvq_vl.recent=16,24"]), request, False, Silent())
    assert len(runs) == 2 * 2  # the new point, and the 16-bit cache to measure it against
    rows = read_rows(request.out / SAMPLES)
    assert len(rows) == 2 * 4


def test_named_sweeps_keep_their_tasks_unless_told(request_of: Callable[..., EvalRequest]) -> None:
    request = request_of("wqa")
    sweeps = choose_sweeps(["akvq_vl.pivots=0,3"])
    ablate(sweeps, request, True, Silent())
    ablate(choose_sweeps(["table3"]), request_of("oe"), True, Silent())
    noted = json.loads((request.out / SWEEPS).read_text())
    assert {name: sweep["tasks"] for name, sweep in noted.items()} == {
        "akvq_vl.pivots": ["wqa"],
        "table3": ["oe"],
    }
    files = write_ablation(request.out)
    assert all(path.is_file() for path in files)
    assert {path.name for path in files} == {
        "ablation.md",
        "ablation.csv",
        *(
            f"{name}_tiny_quantized_prefill.{kind}"
            for name in ("akvq_vl.pivots", "table3")
            for kind in ("svg", "png")
        ),
    }
    text = ablation_summary(request.out)
    assert "+ PSA" in text
    assert "OE step" in text
    lines = (request.out / "ablation.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 + 5  # header, two points and four steps beside the 16-bit cache


def test_a_folder_without_sweeps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kvbench ablate"):
        write_ablation(tmp_path)
