"""Figures inside a page: the right points, colours from the page, names of their own."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from xml.etree import ElementTree

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import Block, build
from kvbench.report.html.charts import forest, front, inline, tradeoff

MakeRows = Callable[..., list[SampleRow]]


@pytest.fixture
def block(make_rows: MakeRows) -> Block:
    rows = [
        *make_rows("fp16", "oe", "++++", cache_bytes=8_000_000),
        *make_rows("kivi", "oe", "+++-", cache_bytes=2_000_000),
        *make_rows("rtn_int4", "oe", "++--", cache_bytes=3_000_000),
        *make_rows("$x$ < _y", "oe", "+---", cache_bytes=1_000_000),
    ]
    return build(rows).blocks[0]


def texts(svg: str) -> set[str]:
    tree = ElementTree.fromstring(svg)
    return {"".join(node.itertext()).strip() for node in tree.iter("text")}


def test_the_front_is_what_no_point_beats() -> None:
    draw = random.Random(0)
    for _ in range(200):
        points = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(8)]
        beaten = {p for p in points for q in points if q[0] <= p[0] and q[1] >= p[1] and q != p}
        assert set(front(points)) == set(points) - beaten


def test_tradeoff_says_who_is_on_the_front(block: Block) -> None:
    chart = tradeoff(block, "one")
    assert chart is not None
    # rtn_int4 has more bytes than kivi and is worse.
    assert chart.words == "Accuracy against cache bytes. On the Pareto front: FP16, KIVI, $x$ < _y."
    assert {"FP16", "KIVI", "RTN (INT4)", "$x$ < _y", "cache a sample (MB)"} <= texts(chart.svg)


def test_tradeoff_needs_bytes(make_rows: MakeRows) -> None:
    rows = [
        *make_rows("fp16", "oe", "+", cache_bytes=8),
        *make_rows("x", "oe", "+", storage="simulated"),
    ]
    assert tradeoff(build(rows).blocks[0], "one") is None


def test_forest_has_a_panel_a_method(block: Block) -> None:
    chart = forest(block, "two")
    assert chart is not None
    assert {"KIVI", "RTN (INT4)", "$x$ < _y", "OE"} <= texts(chart.svg)
    assert not {"FP16", "Mean"} & texts(chart.svg)  # the mean of one task is that task


def test_forest_needs_something_to_compare(make_rows: MakeRows) -> None:
    assert forest(build(make_rows("fp16", "oe", "++")).blocks[0], "two") is None
    assert forest(build(make_rows("kivi", "oe", "++")).blocks[0], "two") is None


def test_colours_are_the_pages_and_names_the_figures_own(block: Block) -> None:
    for name, draw in (("one", tradeoff), ("two", forest)):
        chart = draw(block, name)
        assert chart is not None
        assert not re.search(r"#[0-9a-fA-F]{6}", chart.svg)
        assert "<style" not in chart.svg and "<metadata" not in chart.svg
        ids = re.findall(r'\bid="([^"]*)"', chart.svg)
        used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', chart.svg)
        assert all(found.startswith(f"{name}-") for found in ids)
        assert {a or b for a, b in used} <= set(ids) and used


def test_text_of_the_data_is_left_alone() -> None:
    svg = '<?xml?><svg width="1"><g id="a"><text style="fill: #ffffff">'
    svg += "url(#a) #ffffff</text></g></svg>"
    assert inline(svg, "n") == (
        '<svg aria-hidden="true" focusable="false"><g id="n-a">'
        '<text style="fill: var(--paper)">url(#a) #ffffff</text></g></svg>'
    )
