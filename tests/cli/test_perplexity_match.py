"""``kvbench perplexity --bits`` on a tiny model: settings, their comparison, and bad input."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.perplexity.rows import read_perplexity

Invoke = Callable[..., Result]
METHODS = "rtn_int2,rtn_int4,skvq,akvq_vl,hf_quanto_int2"
SMALL = ("--window", 64, "--context", 40, "--limit", 2, "--samples", 2, "--device", "cpu")


@pytest.fixture
def words(tiny_text_folder: Path, tmp_path: Path) -> list[Any]:
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(str(n * n) for n in range(200)), encoding="utf-8")
    command = ["perplexity", "--model", f"tiny={tiny_text_folder}", "--text", text]
    return [*command, "--out", tmp_path / "run", "--methods", METHODS, *SMALL]


def matches(out: Path) -> dict[float, dict[str, Any]]:
    document = json.loads((out / "matched.json").read_text(encoding="utf-8"))
    return {one["budget"]: one for one in document["matches"]}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_settings_of_a_size_are_compared(
    invoke: Invoke, words: list[Any], tmp_path: Path, protocol: str
) -> None:
    out = tmp_path / "run"
    words += ["--bits", "8.5,4.25", "--protocol", protocol]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    found, rows = matches(out), read_perplexity(out)
    assert list(found) == [4.25, 8.5]
    assert found[4.25]["absent"]["hf_quanto_int2"] == "brings a cache of its own"
    assert found[4.25]["absent"]["rtn_int4"] == "is the same as rtn_int2"
    for budget, match in found.items():
        for point in match["points"]:
            mine = [row for row in rows if row.method == point["method"]]
            assert [row.status for row in mine] == ["ok"] * 2
            mean = sum(row.bits_per_element or 0 for row in mine) / 2
            assert mean == pytest.approx(point["bits"], rel=0.01), point
            assert 0.9 * budget <= point["bits"] <= budget
    assert {p["name"] for p in found[8.5]["points"]} >= {"akvq_vl", "skvq"}
    assert {row.method for row in rows} == {
        "fp16",
        *(point["method"] for match in found.values() for point in match["points"]),
    }

    with (out / "matched.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    for budget in ("4.25", "8.5"):
        mine_ = [line for line in lines if line["budget"] == budget and line["kl_mean"]]
        assert mine_[0]["method"] == "fp16"
        order = [float(line["kl_mean"]) for line in mine_[1:]]
        assert order == sorted(order) and len(order) == len(found[float(budget)]["points"])
        for line in mine_:
            kls = [
                sum(row.kl) / len(row.kl)
                for row in rows
                if row.method == line["method"] and row.kl is not None
            ]
            assert float(line["kl_mean"]) == pytest.approx(sum(kls) / 2)
            assert float(line["kl_mean_low"]) <= sum(kls) / 2 <= float(line["kl_mean_high"])
    text = (out / "matched.md").read_text(encoding="utf-8")
    assert f"## tiny, {protocol}, numbers.txt, T = 64 tokens" in text
    assert "### 8.5 bits" in text and "hf_quanto_int2 (brings a cache of its own)" in text
    assert {path.name for path in out.glob("matched*")} >= {
        "matched.md",
        "matched.csv",
        f"matched_tiny_{protocol}_64.svg",
        f"matched_tiny_{protocol}_64.png",
    }


def test_a_plan_runs_nothing_and_a_rerun_adds_nothing(
    invoke: Invoke, words: list[Any], tmp_path: Path
) -> None:
    out, rows = tmp_path / "run", tmp_path / "run" / "perplexity.jsonl"
    words += ["--bits", "4.25", "--methods", "rtn_int2,kivi"]
    plan = invoke(*words, "--plan")
    assert plan.exit_code == 0, plan.output
    assert '--methods "rtn_int2,' in plan.stdout
    assert not rows.exists() and not (out / "matched.md").exists()
    assert invoke(*words).exit_code == 0
    before = rows.read_bytes()
    assert invoke(*words).exit_code == 0
    assert rows.read_bytes() == before


def test_other_windows_of_the_folder_are_not_shown(
    invoke: Invoke, words: list[Any], tmp_path: Path
) -> None:
    words += ["--methods", "rtn_int2"]
    assert invoke(*words, "--window", 48).exit_code == 0
    assert invoke(*words, "--bits", "4.25").exit_code == 0
    text = (tmp_path / "run" / "matched.md").read_text(encoding="utf-8")
    assert "T = 64 tokens" in text and "T = 48 tokens" not in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--bits", "2.25", "--protocol", "both"), "--bits finds settings for one protocol"),
        (("--bits", "two"), "--bits has 'two'"),
        (("--bits", "2.25", "--samples", 0), "--samples is 0"),
        (("--plan",), "--plan shows the settings of --bits: give both"),
        (("--bits", "1.5", "--methods", "rtn_int2"), "no method has a setting of these sizes"),
    ],
)
def test_bad_input(
    invoke: Invoke, words: list[Any], option: tuple[object, ...], message: str
) -> None:
    result = invoke(*words, *option)
    assert result.exit_code == 2 and message in result.stderr
    assert "Traceback" not in result.output
    assert not any(line for line in result.stderr.splitlines()[:-1] if "kvbench:" in line)
