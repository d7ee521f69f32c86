"""The paper's claims as goals: every one finds its rows, and is judged by its own direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvbench.efficiency import preset
from kvbench.efficiency.preset import GOALS, Rows, goals_table, paper_scenarios
from kvbench.efficiency.request import TrialResult
from kvbench.efficiency.rows import EfficiencyRow, Setting, make_row
from kvbench.efficiency.workload import Workload

BASE = TrialResult("ok", peak_nvml=50 << 30, cache_bytes=300, workspace_bytes=20, total_s=100.0,
                   prompts_s=(1.0, 1.25, 0.5))  # fmt: skip
# Batch, tokens a second, decode step over floor of every row that the goals ask for.
FIGURES = {
    ("fp16", 600, None): (100, 1000.0, 1.3),
    ("akvq_vl", 600, None): (350, 2500.0, 1.1),
    ("hf_dynamic", 600, None): (90, 250.0, 9.0),
    ("akvq_vl", 600, 40): (40, 900.0, 1.4),
    ("fp16", 600, 40): (40, 600.0, 1.2),
    ("hf_dynamic", 600, 40): (40, 300.0, 8.0),
    ("fp16", 4000, None): (20, 200.0, 1.3),
    ("akvq_vl", 4000, None): (110, 900.0, 1.3),
    ("akvq_vl", 600, 80): (80, 1600.0, 1.2),
    ("hf_quanto_int2", 600, 80): (80, 100.0, 20.0),
}
# Decode steps alone take half of the time of all but akvq_vl's, two thirds of its. Prompts take 10
# seconds, a step 0.05 or 0.02 (akvq_vl) at its floor, of which there are 511.
FLOORS = (10 + 511 * 0.05) / (10 + 511 * 0.02)
EXPECTED = [3.5, 2.5, 3.5 * FLOORS, 1.875, 10, 1.3, 1.1, 2, 4, 5.5, 4.5, 5.5 * FLOORS, 3.375, 16]
VERDICTS = ["met", "met", "", "missed", "met", "met", "hoped for", "missed", "hoped for", "met",
            "met", "", "missed", "hoped for"]  # fmt: skip


def row(method: str, tokens: int, fixed: int | None, **changes: Any) -> EfficiencyRow:
    batch, throughput, over = FIGURES[method, tokens, fixed]
    setting = Setting(
        model="llava15_7b", model_label="", revision="random", method=method, label=method,
        runner="engine", protocol="exact_prefill", dtype="float16", input_tokens=tokens,
        vision_tokens=576, output_tokens=512, fixed_batch=fixed, prefill_rows=8, seed=0,
        gpu="v100", gpu_label="", memory="emulated", memory_limit=1, device="", code="",
        versions={},
    )  # fmt: skip
    made = make_row(setting, BASE, batch=batch, out_of_memory_at=None, tries=1, machine="",
                    command="", time="")  # fmt: skip
    cache = {"akvq_vl": 60}.get(method, 300)
    decode = throughput * {"akvq_vl": 1.5}.get(method, 2.0)
    return dataclasses.replace(
        made, throughput=throughput, decode_throughput=decode, over_floor=over,
        cache_bytes=cache, ttft_s=10.0, floor_s=0.02 if method == "akvq_vl" else 0.05, **changes,
    )  # fmt: skip


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[EfficiencyRow]:
    monkeypatch.setattr(preset, "_error", lambda row: 2.0 if row.batch == 40 else 1.0)
    return [row(*place) for place in FIGURES]


def test_every_goal(rows: list[EfficiencyRow]) -> None:
    values = [goal.value(Rows(rows)) for goal in GOALS]
    assert values[:-2] == pytest.approx(EXPECTED)
    assert values[-2:] == pytest.approx([1.25, 2.0])  # the latter in percent
    verdicts = [goal.verdict(value) for goal, value in zip(GOALS, values, strict=True)]
    assert verdicts == [*VERDICTS, "met", "met"]


def test_the_scenarios_are_what_the_goals_ask_for() -> None:
    places = [(s.method, s.input_tokens, s.batch) for s in paper_scenarios()]
    assert sorted(places, key=str) == sorted(FIGURES, key=str)
    assert places[:2] == [("fp16", 600, None), ("akvq_vl", 600, None)]
    assert {s.output_tokens for s in paper_scenarios()} == {512}


def test_missing_and_failed_rows_leave_goals_open(rows: list[EfficiencyRow]) -> None:
    for index, place in enumerate(FIGURES):
        broken = dataclasses.replace(rows[index], status="failed", detail="crash")
        for rest in ([*rows[:index], *rows[index + 1 :]],
                     [*rows[:index], broken, *rows[index + 1 :]]):  # fmt: skip
            open_goals = [goal for goal in GOALS if goal.value(Rows(rest)) is None]
            assert open_goals, place
            assert all(goal.verdict(None) == "not measured" for goal in open_goals)
    assert [goal.value(Rows([])) for goal in GOALS] == [None] * len(GOALS)


def test_the_table(rows: list[EfficiencyRow]) -> None:
    lines = goals_table(rows, "github").splitlines()
    assert len(lines) == 2 + len(GOALS)
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == ["3.25×", "3.6×", "3.50×", "met"]  # noqa: RUF001
    assert "≤ 1.35×" in lines[7] and "≤ 1.15×" in lines[7]  # noqa: RUF001
    assert "≤ 5%" in lines[-1] and "2.00%" in lines[-1]
    assert goals_table([]).count("not measured") == len(GOALS)


def test_the_capacity_model_is_held_against_every_measured_peak() -> None:
    model = preset.model_capacity(preset.MODELS.get("llava15_7b"), "akvq_vl")
    peak = model.footprint(Workload(600, 576, 512, 40), 8)
    near = row("fp16", 600, 40, peak_nvml=None)
    engine = row("akvq_vl", 600, 40, peak_nvml=10 << 30)
    peer = dataclasses.replace(engine, runner="generate", peak_torch=5 << 30)
    for far, expected in ((engine, peak.total / (10 << 30)), (peer, peak.allocated / (5 << 30))):
        assert Rows([near, far]).worst_model() == pytest.approx(100 * (expected - 1))
    assert Rows([near]).worst_model() is None


def test_models_are_no_measurements(rows: list[EfficiencyRow]) -> None:
    modelled = [dataclasses.replace(each, memory="modelled") for each in rows]
    assert {goal.value(Rows(modelled)) for goal in GOALS} == {None}
