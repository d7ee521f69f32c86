"""The paper's values beside those measured here."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import build
from kvbench.report.comparison import comparable, paper_csv, paper_markdown

MakeRows = Callable[..., list[SampleRow]]


def table(rows: list[SampleRow]) -> list[list[str]]:
    lines = [line for line in paper_markdown(build(rows)).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_paper_here_and_difference(make_rows: MakeRows) -> None:
    place = {"model": "llava15_7b", "dataset": "milebench"}
    rows = make_rows("akvq_vl", "oe", "+-", **place) + make_rows("akvq_vl", "st", "++", **place)
    rows += make_rows("akvq_vl[recent=64]", "oe", "+-", **place)
    assert table(rows)[2:] == [
        ["AKVQ-VL", "paper", "54.0", "78.0", "66.0"],
        ["", "here", "50.0", "100.0", "75.0"],
        ["", "difference", "-4.0", "+22.0", "+9.0"],
    ]


def test_copy_errors_are_shown_but_not_compared(make_rows: MakeRows) -> None:
    place = {"model": "llava16_mistral", "dataset": "milebench"}
    rows = make_rows("rtn_int4", "oe", "+-", **place) + make_rows("rtn_int4", "en", "++", **place)
    assert table(rows)[2:] == [
        ["RTN (INT4)", "paper", "35.5", r"28.0\*", "35.5"],
        ["", "here", "50.0", "100.0", "50.0"],
        ["", "difference", "+14.5", r"\*", "+14.5"],
    ]
    good, bad = csv.DictReader(io.StringIO(paper_csv(build(rows))))
    assert (good["task"], good["comparable"], good["difference"]) == ("oe", "yes", "14.5")
    assert (bad["task"], bad["comparable"], bad["difference"]) == ("en", "no", "")
    assert "copy error" in bad["note"]


def test_missing_and_unfinished_cells(make_rows: MakeRows) -> None:
    place = {"model": "llava15_7b", "dataset": "milebench"}
    rows = make_rows("fp16", "oe", "+-", **place) + make_rows("fp16", "st", "++", **place)
    rows += make_rows("kivi", "oe", "+", **place)
    kivi = table(rows)[5:]
    assert kivi == [
        ["KIVI", "paper", "18.0", "-", "18.0"],
        ["", "here", "100.0 (n=1)", "-", "100.0"],
        ["", "difference", "+82.0", "-", "+82.0"],
    ]


@pytest.mark.parametrize(
    ("model", "dataset", "count"),
    [
        ("llava15_7b", "milebench", 1),
        ("llava15_7b", "minimile-1-seed0", 0),
        ("tiny", "milebench", 0),
    ],
)
def test_only_the_papers_models_and_data_are_compared(
    make_rows: MakeRows, model: str, dataset: str, count: int
) -> None:
    rows = make_rows("fp16", "oe", "+", model=model, dataset=dataset)
    assert len(comparable(build(rows))) == count
