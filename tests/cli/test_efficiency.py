"""``kvbench efficiency``: from words to scenarios and conditions, and to an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.efficiency import run as run_module
from kvbench.efficiency.preset import GOALS, paper_scenarios
from kvbench.efficiency.scenario import Conditions, Scenario
from kvbench.errors import UserError

Invoke = Callable[..., Result]


class Recorder:
    """Stands in for the measurement: remembers what was asked, then does as told."""

    def __init__(self) -> None:
        self.scenarios: list[Scenario] = []
        self.conditions: Conditions | None = None
        self.outcome: BaseException | None = None

    def measure(self, scenarios: Any, conditions: Conditions, progress: Any) -> bool:
        self.scenarios, self.conditions = list(scenarios), conditions
        progress.begin(len(self.scenarios), 0)
        progress.cell(self.scenarios[0].label)
        if self.outcome is not None:
            raise self.outcome
        return True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(run_module, "measure", recorder.measure)
    monkeypatch.setattr("kvbench.efficiency.profiles.visible_device", lambda: None)
    return recorder


def test_defaults_are_the_papers_setting(invoke: Invoke, recorder: Recorder) -> None:
    result = invoke("efficiency")
    assert result.exit_code == 0, result.output
    assert recorder.scenarios == [
        Scenario("llava15_7b", method, 600, 512) for method in ("fp16", "akvq_vl")
    ]
    conditions = recorder.conditions
    assert conditions is not None
    assert conditions.target.profile.name == "v100"
    assert conditions.target.limit == 64 << 30
    assert conditions.out.parent == Path("results/runs")
    assert "llava15_7b · fp16 · 600 in, 512 out · largest batch" in result.stderr


def test_options_arrive(invoke: Invoke, recorder: Recorder, tmp_path: Path) -> None:
    words = (
        "--gpu h100 --models qwen2vl_7b --methods akvq_vl[recent=64],hf_dynamic --batch 8,largest"
    )
    tokens = "--input-tokens 1200 --output-tokens 64 --vision-tokens 576"
    others = "--timeout 30 --minutes 5 --tolerance 0 --prefill-rows 2 --seed 3 --dtype bfloat16"
    result = invoke("efficiency", *f"{words} {tokens} {others}".split(), "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert recorder.scenarios == [
        Scenario("qwen2vl_7b", method, 1200, 64, 576, batch)
        for batch in (8, None)
        for method in ("akvq_vl[recent=64]", "hf_dynamic")
    ]
    found = recorder.conditions
    assert found is not None
    assert (found.target.profile.name, found.out, found.dtype) == ("h100", tmp_path, "bfloat16")
    assert (found.timeout, found.minutes, found.tolerance) == (30, 5, 0)
    assert (found.prefill_rows, found.seed) == (2, 3)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--gpu v1000", "did you mean v100"),
        ("--gpu auto", "there is no GPU here"),
        ("--models llava15_7", "did you mean"),
        ("--models llava15_7b=/no/such", "/no/such"),
        ("--methods kivy", "did you mean kivi?"),
        ("--methods kivi[bitz=2]", "did you mean bits?"),
        ("--batch 0", "--batch has '0'"),
        ("--batch many", "--batch has 'many'"),
        ("--dtype half", "unknown dtype"),
        ("--timeout 0", "--timeout"),
        ("--minutes -1", "--minutes"),
        ("--tolerance 1", "--tolerance is 1.0"),
        ("--prefill-rows 0", "--prefill-rows"),
        ("--seed -1", "--seed"),
        ("--preset paper --methods fp16", "--preset paper has its own --methods"),
        ("--preset paper --input-tokens 5", "has its own --input-tokens"),
        ("--preset paper --batch 5", "has its own --batch"),
        (f"--out {__file__}", "is a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, recorder: Recorder, words: str, part: str
) -> None:
    result = invoke("efficiency", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert recorder.conditions is None


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--input-tokens 0", "at least 1"),
        ("--vision-tokens 7", "whole images of 576 tokens"),
        ("--vision-tokens 1152", "don't fit"),
    ],
)
def test_bad_workloads(invoke: Invoke, tmp_path: Path, words: str, part: str) -> None:
    result = invoke("efficiency", *words.split(), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert part in result.stderr
    assert not (tmp_path / "out").exists()


def test_presets(invoke: Invoke, recorder: Recorder) -> None:
    assert invoke("efficiency", "--preset", "paper").exit_code == 0
    assert recorder.scenarios == paper_scenarios("llava15_7b")
    assert invoke("efficiency", "--preset", "papers").exit_code == 2


def test_plan_runs_nothing(invoke: Invoke, recorder: Recorder, tmp_path: Path) -> None:
    words = "--plan --methods fp16,akvq_vl,hf_dynamic --batch 40,largest --vision-tokens 0"
    result = invoke("efficiency", *words.split(), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[1] for line in lines[2:]] == ["fp16", "akvq_vl", "hf_dynamic"]
    assert "40" in result.stdout.splitlines()[0]
    assert recorder.conditions is None
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_the_capacity_model_answers(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.efficiency.profiles.visible_device", lambda: None)
    out = tmp_path / "out"
    result = invoke("efficiency", "--preset", "paper", "--out", out)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "efficiency.jsonl").read_text().splitlines()]
    assert len(rows) == len(paper_scenarios())
    assert {row["memory"] for row in rows} == {"modelled"}
    assert str(out / "table4.md") in result.stdout
    assert (out / "goals.md").read_text().count("not measured") == len(GOALS)
    again = invoke("report", out)
    assert again.exit_code == 0
    assert str(out / "table4.csv") in again.stdout


def test_interrupted_run_says_how_to_go_on(
    invoke: Invoke, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.outcome = KeyboardInterrupt()
    result = invoke("efficiency", "--out", tmp_path)
    assert result.exit_code == 130
    assert f"--out {tmp_path} goes on" in result.stderr


def test_errors_of_the_run(invoke: Invoke, recorder: Recorder) -> None:
    recorder.outcome = UserError("no memory model is known for it: measure it")
    result = invoke("efficiency")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "kvbench: no memory model is known for it: measure it"
