"""Intervals, paired differences, rates and KL of a cell, by hand."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import build
from kvbench.report.cells import Cell
from kvbench.report.details import details_csv, details_markdown

MakeRows = Callable[..., list[SampleRow]]


def csv_line(rows: list[SampleRow], method: str, task: str) -> dict[str, str]:
    lines = csv.DictReader(io.StringIO(details_csv(build(rows))))
    return next(line for line in lines if (line["method"], line["task"]) == (method, task))


def only_cell(rows: list[SampleRow], method: str) -> Cell:
    return build(rows).blocks[0].cells[method, "oe"]


def test_a_cell_by_hand(make_rows: MakeRows) -> None:
    # Of 8 samples 3 become wrong and 1 becomes right; fp16 has 6 right, kivi 4.
    rows = make_rows("fp16", "oe", "++++++--") + make_rows("kivi", "oe", "+++---+-", kl_mean=0.5)
    line = csv_line(rows, "kivi", "oe")
    assert (line["n"], line["expected"], line["paired_n"]) == ("8", "8", "8")
    assert (line["accuracy"], line["difference"]) == ("50", "-25")
    assert (line["lost"], line["gained"], line["flips"]) == ("3", "1", "50")
    assert line["mcnemar_p"] == "0.625"  # 2 (1 + 4) / 16
    assert float(line["accuracy_low"]) == pytest.approx(21.52, abs=0.01)  # Wilson, 4 of 8
    assert float(line["accuracy_high"]) == pytest.approx(78.48, abs=0.01)
    assert line["agreement"] == "50"
    assert (line["kl_mean"], line["kl_mean_se"], line["kl_first"]) == ("0.5", "0", "")


def test_a_markdown_line_by_hand(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "++") + make_rows("kivi", "oe", "++", kl_first=0.125)
    line = next(row for row in details_markdown(build(rows)).splitlines() if "KIVI" in row)
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "KIVI", "OE", "-", "-", "0.125 ± 0", "-", "100.0", "100.0 [34.2, 100.0]", "2", "100.0",
        "+0.0 [+0.0, +0.0]", "0/0", "1.000", "-", "0.0", "0.0", "0", "0", "100", "1", "packed", "-",
    ]  # fmt: skip


def test_the_difference_counts_only_samples_that_both_answered(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "+!+-") + make_rows("kivi", "oe", "+--!")
    comparison = only_cell(rows, "kivi").comparison
    assert comparison is not None
    assert (comparison.counts.n, comparison.counts.lost, comparison.counts.gained) == (2, 1, 0)


def test_the_difference_needs_the_same_prompt_and_images(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "++") + make_rows("kivi", "oe", "--", images_sha256="else")
    cell = only_cell(rows, "kivi")
    assert cell.comparison is None
    assert cell.agreement is None
    assert cell.accuracy == 0.0


def test_the_baseline_is_of_the_same_protocol(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "++", protocol="exact_prefill") + make_rows("kivi", "oe", "--")
    assert only_cell(rows, "kivi").comparison is None


def test_the_baseline_is_not_compared_with_itself(make_rows: MakeRows) -> None:
    cell = only_cell(make_rows("fp16", "oe", "+-"), "fp16")
    assert cell.comparison is None


def test_without_its_baseline_a_row_says_whether_it_agreed(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "+", agrees=True)
    rows += make_rows("kivi", "oe", "-+", agrees=False)[1:]
    assert only_cell(rows, "kivi").agreement == 0.5


def test_rates_are_shares_of_answered_samples(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "++--", empty=True, strict=False)
    rows += make_rows("kivi", "oe", "----!!")[4:]
    cell = only_cell(rows, "kivi")
    assert (cell.n, cell.oom, cell.expected) == (4, 2, 6)
    assert (cell.accuracy, cell.strict, cell.empty, cell.unparsable) == (0.5, 0.0, 1.0, 0.0)


def test_flags_say_what_is_wrong(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "+++")
    rows[0] = make_rows("kivi", "oe", "+", packed_tokens_read=0)[0]
    assert csv_line(rows, "kivi", "oe")["flags"] == "cache not read: 1; 2 of 3 samples"
    assert csv_line(rows, "kivi", "oe")["accuracy"] == "100"


def test_the_mean_weighs_tasks_alike(make_rows: MakeRows) -> None:
    rows = make_rows("fp16", "oe", "+" * 10) + make_rows("fp16", "st", "++")
    rows += make_rows("kivi", "oe", "+" * 9 + "-", kl_mean=0.1, bits_per_element=2.0)
    rows += make_rows("kivi", "st", "+-", kl_mean=0.3, bits_per_element=3.0)
    line = csv_line(rows, "kivi", "mean")
    assert (line["accuracy"], line["difference"]) == ("70", "-30")  # of 90 and 50, -10 and -50
    assert (line["n"], line["paired_n"], line["lost"], line["gained"]) == ("12", "12", "2", "0")
    assert line["mcnemar_p"] == "0.5"
    assert (line["kl_mean"], line["bits_per_element"]) == ("0.2", "2.5")


def test_standard_errors_combine_as_of_independent_tasks(make_rows: MakeRows) -> None:
    rows = []
    for task in ("oe", "st"):
        for sample, kl in enumerate((0.0, 2.0)):  # standard error 1 each
            rows.append(make_rows("kivi", task, "++", kl_first=kl)[sample])
    estimate = build(rows).blocks[0].overall["kivi"].kl_first
    assert estimate is not None
    assert (estimate.mean, estimate.n) == (1.0, 4)
    assert estimate.standard_error == pytest.approx(2**0.5 / 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_rows_does_not_matter(small_run: list[SampleRow], seed: int) -> None:
    rows = list(small_run)
    random.Random(seed).shuffle(rows)
    assert details_csv(build(rows)) == details_csv(build(small_run))
    assert details_markdown(build(rows)) == details_markdown(build(small_run))
