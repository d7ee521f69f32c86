"""``kvbench match`` on a tiny model: what was promised is what the evaluation's caches hold."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.evaluation.store import SAMPLES, read_rows

Invoke = Callable[..., Result]
METHODS = "fp16,rtn_int2,rtn_int4,kivi,skvq,akvq_vl,kvtuner,hf_quanto_int2"


@pytest.fixture
def words(data: Path, tiny_llava_folder: Path) -> list[Any]:
    found = ["match", "--models", f"tiny={tiny_llava_folder}", "--data-root", data]
    return [*found, "--device", "cpu", "--tasks", "oe,wqa", "--max-new-tokens", 2]


def by_budget(out: Path) -> dict[float, dict[str, Any]]:
    matches = json.loads((out / "matched.json").read_text())["matches"]
    return {one["budget"]: one for one in matches}


@pytest.mark.slow
def test_promised_bits_are_measured_bits(invoke: Invoke, words: list[Any], tmp_path: Path) -> None:
    words += ["--methods", METHODS, "--protocol", "exact_prefill", "--out", tmp_path]
    result = invoke(*words, "--bits", "4.25,8.5", "--samples", 4)
    assert result.exit_code == 0, result.output
    small, large = (by_budget(tmp_path)[budget] for budget in (4.25, 8.5))
    # Heads of 16 numbers: 2 + 32/16 bits; groups of one head can't be larger.
    assert {"name": "rtn_int2", "method": "rtn_int2", "bits": 4.0} in small["points"]
    assert small["absent"]["rtn_int4"] == "is the same as rtn_int2"
    assert small["absent"]["fp16"] == "stores at least 32.000 bits"  # the tiny model is float32
    assert small["absent"]["hf_quanto_int2"] == "brings a cache of its own"
    assert {p["name"] for p in large["points"]} >= {"akvq_vl", "kivi", "kvtuner", "skvq"}

    rows = read_rows(tmp_path / SAMPLES)
    for match, budget in ((small, 4.25), (large, 8.5)):
        for point in match["points"]:
            found = [row for row in rows if row.method == point["method"]]
            assert len(found) == 4
            mean = sum(row.bits_per_element or 0 for row in found) / 4  # as many of each task
            assert mean == pytest.approx(point["bits"], abs=1e-9), point
            assert 0.9 * budget <= mean <= budget

    with (tmp_path / "matched.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["measured_bits"]]
    for line in lines:
        assert float(line["measured_bits"]) == pytest.approx(float(line["bits_per_element"]))
    text = (tmp_path / "matched.md").read_text()
    assert "### 8.5 bits" in text
    assert "Not at this size: fp16 (stores at least 32.000 bits)" in text
    for path in result.stdout.split()[-4:]:
        assert Path(path).is_file()

    before = (tmp_path / SAMPLES).read_bytes()
    assert invoke(*words, "--bits", "4.25,8.5", "--samples", 4).exit_code == 0
    assert (tmp_path / SAMPLES).read_bytes() == before


def test_a_budget_that_no_method_meets(invoke: Invoke, words: list[Any], tmp_path: Path) -> None:
    out = ["--methods", "rtn_int2,kvtuner", "--bits", "1.5", "--out", tmp_path, "--samples", 1]
    plan = invoke(*words, *out, "--plan")
    assert plan.exit_code == 0
    assert "rtn_int2 (stores at least 4.000 bits); kvtuner (stores at least 4.000 bits)" in (
        plan.stdout
    )
    assert "--methods" not in plan.stdout
    result = invoke(*words, *out)
    assert result.exit_code == 2
    assert "no method has a setting of these sizes" in result.stderr
    assert not (tmp_path / SAMPLES).exists()


@pytest.mark.parametrize("text", ["two", "0", "-2", "2,,3"])
def test_bits_that_are_none(invoke: Invoke, text: str) -> None:
    result = invoke("match", "--bits", text)
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert result.stderr.count("\n") == 1
