"""The leaderboard: golden tables of small runs, and what must never be mixed or claimed."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.report import leaderboard_markdown
from kvbench.report.board import build
from kvbench.report.table2 import table2_csv

MakeRows = Callable[..., list[SampleRow]]

GOLDEN = """\
# Leaderboard

## tiny, quantized_prefill

- protocol: quantized_prefill: every prompt token attends to the cache as stored
- data: toys; samples a task: 4
- model: tiny, revision r1, float32
- prompt: chatml
- batch: 1
- kvbench: 0.1.0
- generation: `{"max_new_tokens": 8}`
- command: `kvbench eval --limit 4`

| Method    |   Bits |         OE |   ST |               Mean |   Cache bytes |
|:----------|-------:|-----------:|-----:|-------------------:|--------------:|
| FP16      |  16.00 |       75.0 | 75.0 |               75.0 |         8,500 |
| KIVI      |   2.50 | 50.0 (n=2) |    - | 50.0 (1 of 2 tasks) |         1,000 |
| my_method |   3.00 | 100.0 (n=1) | 25.0 |         62.5 (n=5) |             - |
"""
RUN = {"request": {"command": "kvbench eval --limit 4", "samples": {"oe": 4, "st": 4}}}


def squeezed(text: str) -> list[str]:
    """Lines without the padding of columns."""
    return [
        "|".join(cell.strip(" -:") or "-" for cell in line.split("|")) for line in text.splitlines()
    ]


def cells(markdown: str, method: str) -> list[str]:
    """The cells of the first line of a method."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {method} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_the_golden_table(small_run: list[SampleRow]) -> None:
    markdown = leaderboard_markdown(small_run, RUN)
    expected = squeezed(GOLDEN)
    assert squeezed(markdown)[: len(expected)] == expected


@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_rows_does_not_matter(small_run: list[SampleRow], seed: int) -> None:
    rows = [*small_run, *small_run[:3]]
    random.Random(seed).shuffle(rows)
    assert leaderboard_markdown(rows, RUN) == leaderboard_markdown(small_run, RUN)
    assert table2_csv(build(rows, RUN)) == table2_csv(build(small_run, RUN))


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("protocol", "exact_prefill"),
        ("model", "tiny2"),
        ("dataset", "other"),
        ("revision", "r2"),
        ("dtype", "bfloat16"),
        ("prompt_style", "plain"),
        ("generation", {"max_new_tokens": 9}),
        ("version", "0.2.0"),
    ],
)
def test_what_differs_in_setting_never_shares_a_table(
    make_rows: MakeRows, field: str, other: object
) -> None:
    rows = make_rows("fp16", "oe", "++") + make_rows("fp16", "oe", "--", **{field: other})
    blocks = build(rows).blocks
    assert [block.cells["fp16", "oe"].n for block in blocks] == [2, 2]
    assert {block.cells["fp16", "oe"].accuracy for block in blocks} == {0.0, 1.0}
    assert leaderboard_markdown(rows).count("\n## ") == 2


def test_models_and_protocols_follow_the_papers_order(make_rows: MakeRows) -> None:
    rows = [
        row
        for model in ("another", "llava16_mistral", "llava15_7b")
        for protocol in ("exact_prefill", "quantized_prefill")
        for row in make_rows("fp16", "oe", "+", model=model, protocol=protocol)
    ]
    titles = [line for line in leaderboard_markdown(rows).splitlines() if line.startswith("## ")]
    assert titles == [
        "## LLaVA-v1.5-7B (llava15_7b), quantized_prefill",
        "## LLaVA-v1.5-7B (llava15_7b), exact_prefill",
        "## LLaVA-v1.6-mistral-7B (llava16_mistral), quantized_prefill",
        "## LLaVA-v1.6-mistral-7B (llava16_mistral), exact_prefill",
        "## another, quantized_prefill",
        "## another, exact_prefill",
    ]


def test_an_unread_cache_gets_no_score(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "++++")
    rows += make_rows("kivi", "oe", "++++", packed_tokens_read=0)
    rows += make_rows("skvq", "oe", "++++", packed_tokens_read=None)
    rows += make_rows("hf_quanto_int2", "oe", "++++", storage="foreign", packed_tokens_read=None)
    markdown = leaderboard_markdown(rows)
    assert cells(markdown, "FP16")[1:3] == ["100.0", "100.0"]
    assert cells(markdown, "KIVI")[1:3] == ["not read", "not read"]
    assert cells(markdown, "SKVQ")[1:3] == ["not read", "not read"]
    assert cells(markdown, "hf_quanto_int2")[1:3] == ["100.0", "100.0"]


def test_out_of_memory_is_no_wrong_answer(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "+!+!") + make_rows("kivi", "oe", "!!!!")
    markdown = leaderboard_markdown(rows)
    assert cells(markdown, "FP16")[1] == "100.0 (n=2)"
    assert cells(markdown, "KIVI")[1] == "OOM"


@pytest.mark.parametrize("storage", ["simulated", "foreign"])
def test_only_packed_storage_may_claim_bytes(make_rows: MakeRows, storage: str) -> None:
    rows = make_rows("kivi", "oe", "++", storage=storage, cache_bytes=1234)
    assert cells(leaderboard_markdown(rows), "KIVI")[-1] == "-"
    line = next(csv.DictReader(io.StringIO(table2_csv(build(rows)))))
    assert (line["cache_bytes"], line["storage"]) == ("", storage)


@pytest.mark.parametrize("field", ["prompt_sha256", "images_sha256", "calibration"])
def test_what_was_run_in_two_ways_has_no_score(make_rows: MakeRows, field: str) -> None:
    rows = make_rows("kivi", "oe", "++")
    rows += make_rows("kivi", "oe", "-", key="other", **{field: "another"})
    assert cells(leaderboard_markdown(rows), "KIVI")[1] == "mixed"


def test_a_sample_run_in_two_batch_sizes_counts_once(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "--", batch=8) + make_rows("kivi", "oe", "++", batch=1)
    cell = build(rows).blocks[0].cells["kivi", "oe"]
    assert (cell.n, cell.accuracy) == (2, 1.0)


def test_only_the_newest_version_of_a_task_counts(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "----", task_version=1, key="old")[:1]
    rows += make_rows("kivi", "oe", "++", task_version=2)
    cell = build(rows).blocks[0].cells["kivi", "oe"]
    assert (cell.n, cell.accuracy) == (2, 1.0)


def test_tasks_outside_the_paper_stay_out_of_the_mean(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "++") + make_rows("fp16", "easy_vqa", "--")
    assert cells(leaderboard_markdown(rows), "FP16")[1:4] == ["100.0", "0.0", "100.0"]
    alone = make_rows("fp16", "easy_vqa", "+-")
    assert cells(leaderboard_markdown(alone), "FP16")[1:3] == ["50.0", "50.0"]


def test_csv_has_plain_numbers_and_says_what_is_missing(small_run: list[SampleRow]) -> None:
    lines = list(csv.DictReader(io.StringIO(table2_csv(build(small_run, RUN)))))
    assert [line["method"] for line in lines] == ["fp16", "kivi", "my_method"]
    assert [line["oe"] for line in lines] == ["75", "50", "100"]
    assert [line["st"] for line in lines] == ["75", "", "25"]
    assert [line["incomplete"] for line in lines] == ["", "oe 2/4; st 0", "oe 1/4"]
    assert lines[0]["cache_bytes"] == "8500"
    assert lines[0]["generation"] == '{"max_new_tokens": 8}'


def test_text_from_data_cannot_break_a_table(make_rows: MakeRows) -> None:
    name = "a|b\n<b>*c*</b> `d` [e](f)\x1b[31m"
    rows = make_rows("fp16", "oe", "+", model=name, dataset="x|y\n## z", revision="`")
    rows += make_rows(name, "oe", "+", model=name, dataset="x|y\n## z", revision="`")
    markdown = leaderboard_markdown(rows, {"request": {"command": "a `b` \n``c"}})
    lines = markdown.splitlines()
    assert "\x1b" not in markdown
    assert [line for line in lines if line.startswith("## ")] == [
        r"## a\|b &lt;b&gt;\*c\*&lt;/b&gt; \`d\` [e\](f) [31m, quantized_prefill"
    ]
    assert r"- data: x\|y ## z; samples a task: 1" in lines
    assert "- command: ```a `b` ``c```" in lines
    table = [line.replace(r"\|", "") for line in lines if line.startswith("|")]
    assert {line.count("|") for line in table} == {6}
