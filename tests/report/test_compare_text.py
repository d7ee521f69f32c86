"""What ``kvbench compare`` prints and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.report.regression import (
    Limits,
    check,
    comparison_markdown,
    comparison_text,
    junit_xml,
)
from kvbench.report.regression.outcomes import outcome
from kvbench.report.regression.result import Comparison

MakeRows = Callable[..., list[SampleRow]]
NASTY = 'my_method[name=<a href="x">|&\x07]'


@pytest.fixture
def comparison(make_rows: MakeRows) -> Comparison:
    """fp16 unchanged, kivi dropped in one of two tasks, a strange method bigger."""
    stored = {"bits_per_element": 2.5, "cache_bytes": 1000}
    before = [
        row
        for method in ("fp16", "kivi", NASTY)
        for task in ("oe", "st")
        for row in make_rows(method, task, "+" * 20, **stored)
    ]
    now = [
        dataclasses.replace(row, correct=False)
        if (row.method, row.task) == ("kivi", "st") and row.sample_id < 12
        else dataclasses.replace(row, bits_per_element=3.0)
        if row.method == NASTY
        else row
        for row in before
    ]
    return check(map(outcome, now), map(outcome, before), Limits())


def test_text(comparison: Comparison) -> None:
    text = comparison_text(comparison)
    assert "\x07" not in text
    lines = text.splitlines()
    assert lines[0] == "tiny, quantized_prefill: 2 tasks, 40 samples a method"
    fp16, kivi, nasty = (line.split() for line in lines[4:7])
    assert fp16[:6] == ["FP16", "100.0", "100.0", "+0.0", "0", "0"]
    assert fp16[-1] == "unchanged"
    assert kivi[:4] == ["KIVI", "100.0", "70.0", "-30.0"]
    assert kivi[-1] == "DROPPED"
    assert nasty[-2:] == ["MORE", "BITS"]
    assert "2.50 to 3.00" in lines[6]
    assert "FAIL: 2 of 3 methods and protocols got worse" in lines
    assert any(
        line.startswith("  kivi, quantized_prefill: mean dropped by 30.0 points (p = 0.00049)")
        and line.endswith("(and 1 tasks: st)")
        for line in lines
    )
    # Two tests can reach a level of 0.025: 7 of 7 flips have p = 0.016.
    assert lines[-1].startswith(
        "smallest drop that shows: 17.5 points in a mean, 35.0 points in a task"
    )
    assert "p < 0.025, which is 0.05 over all tasks and means" in lines[-1]


def test_nothing_wrong(make_rows: MakeRows) -> None:
    rows = [outcome(row) for row in make_rows("kivi", "oe", "+-+")]
    result = check(rows, rows, Limits())
    assert "OK: none of 1 methods and protocols got worse" in comparison_text(result)
    assert "shows: none, for want of samples, in a mean" in comparison_text(result)
    assert comparison_markdown(result).startswith("## OK: none of 1")
    assert "<details>" not in comparison_markdown(result)


def test_markdown_is_escaped(comparison: Comparison) -> None:
    text = comparison_markdown(comparison)
    assert text.startswith("## FAIL: 2 of 3 methods and protocols got worse\n")
    assert "<a href" not in text
    assert r"my_method[name=&lt;a href=" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") - line.count(r"\|") for line in tables[:5]}) == 1
    assert "<details><summary>3 tasks changed</summary>" in text


def test_junit(comparison: Comparison) -> None:
    root = ElementTree.fromstring(junit_xml(comparison))
    assert (root.tag, root.attrib["tests"], root.attrib["failures"]) == ("testsuites", "9", "4")
    suites = {suite.attrib["name"]: suite for suite in root}
    kivi = suites["tiny.quantized_prefill.kivi"]
    assert kivi.attrib == {
        "name": "tiny.quantized_prefill.kivi",
        "tests": "3",
        "failures": "2",
        "errors": "0",
    }
    failed = [test.attrib["name"] for test in kivi if test.find("failure") is not None]
    assert failed == ["mean", "st"]
    (message,) = (f.attrib["message"] for f in kivi.findall("testcase[@name='st']/failure"))
    assert message.startswith("dropped: dropped by 60.0 points")
    assert any('<a href="x">|&' in name for name in suites)
