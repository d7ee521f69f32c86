"""The paper's tables as stored: complete, and consistent with each other and with its text."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kvbench.report.paper import label, paper_table, rank

FOLDER = Path(__file__).resolve().parents[2] / "results" / "paper"
TASKS = ["oe", "oi", "ma", "en", "sc", "st", "su", "wqa", "tqa", "mqa", "sqa", "dqa"]
METHODS = ["fp16", "rtn_int4", "rtn_int2", "smoothquant", "kivi", "skvq", "akvq_vl"]


def table(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_2_has_every_cell_in_the_papers_order() -> None:
    paper = paper_table()
    assert list(paper.tasks) == TASKS
    assert list(paper.methods) == METHODS
    assert list(paper.models) == ["llava15_7b", "llava15_13b", "llava16_vicuna", "llava16_mistral"]
    assert len(paper.values) == 4 * 7 * 12
    assert all((2 * value).is_integer() for value in paper.values.values()), "200 samples a task"


@pytest.mark.parametrize(
    ("method", "mean"),
    list(zip(METHODS, [51.5, 45.7, 10.8, 26.0, 19.7, 32.6, 52.7], strict=True)),
)
def test_table_2_means_of_llava15_7b(method: str, mean: float) -> None:
    values = [paper_table().values["llava15_7b", method, task] for task in TASKS]
    assert sum(values) / 12 == pytest.approx(mean, abs=0.051)


def test_suspect_cells_repeat_another_row() -> None:
    paper = paper_table()
    expected = {("llava16_mistral", "rtn_int4", task) for task in TASKS[3:]}
    expected |= {("llava16_mistral", "rtn_int2", task) for task in TASKS[:3]}
    assert set(paper.suspect) == expected
    for key in expected:
        assert paper.values[key] == paper.values["llava16_vicuna", "fp16", key[2]]
        assert "llava16_vicuna fp16" in paper.suspect[key]


def test_table_3_agrees_with_its_changes_and_with_table_2() -> None:
    lines = table("table3.csv")
    scores = [float(line["st"]) for line in lines]
    assert [float(line["change"]) for line in lines[1:]] == [
        pytest.approx(scores[1] - scores[0]),
        pytest.approx(scores[2] - scores[1]),
        pytest.approx(scores[3] - scores[2]),
        pytest.approx(scores[4] - scores[3]),
    ]
    for line in (lines[0], lines[1], lines[-1]):
        assert float(line["st"]) == paper_table().values["llava15_7b", line["method"], "st"]


def test_table_4_gives_the_ratios_of_the_text() -> None:
    fp16, akvq = table("table4.csv")
    assert float(akvq["batch_size"]) / float(fp16["batch_size"]) == 3.25
    ratio = float(akvq["tokens_per_second"]) / float(fp16["tokens_per_second"])
    assert ratio == pytest.approx(2.46, abs=0.005)


def test_table_1_names_the_text_salient_layers() -> None:
    layers = {line["model"]: line["tsa_layers"] for line in table("table1.csv")}
    assert layers.pop("llava16_mistral") == "None"
    assert layers == dict.fromkeys(
        ["llava15_7b", "llava15_13b", "llava16_vicuna", "qwen2vl_7b"], "0-1"
    )


def test_other_names_come_after_the_papers_by_name() -> None:
    methods = ["zeta", "akvq_vl[recent=64]", "akvq_vl", "alpha", "fp16", "kivi"]
    ordered = sorted(methods, key=lambda name: rank(paper_table().methods, name))
    assert ordered == ["fp16", "kivi", "akvq_vl", "akvq_vl[recent=64]", "alpha", "zeta"]


def test_labels_keep_parameters_and_unknown_names() -> None:
    methods = paper_table().methods
    assert label(methods, "rtn_int4") == "RTN (INT4)"
    assert label(methods, "akvq_vl[recent=64]") == "AKVQ-VL [recent=64]"
    assert label(methods, "my_method") == "my_method"
    assert label(paper_table().tasks, "wqa") == "WQA"
