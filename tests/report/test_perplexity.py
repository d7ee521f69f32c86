"""Tables of perplexity rows against their definitions written out again."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvbench.perplexity.rows import Identity, PerplexityRow, Scores, make_row
from kvbench.report.perplexity import build_tables, perplexity_csv, perplexity_markdown

IDENTITY: dict[str, Any] = {
    **{f.name: 1 if f.type == "int" else "x" for f in dataclasses.fields(Identity)},
    "protocol": "quantized_prefill",
    "calibration": "",
}
POSITIONS = 2500


@pytest.fixture
def rows() -> Callable[..., list[PerplexityRow]]:
    """Windows of one method with drawn scores; the larger `spread`, the worse."""

    def make(method: str, spread: float, windows: int = 4, **changes: Any) -> list[PerplexityRow]:
        found = []
        for number in range(windows):
            rng = np.random.default_rng(number)
            kl = spread * rng.exponential(1 + number, POSITIONS)
            nll = rng.exponential(2.0, POSITIONS) + kl
            scores = Scores(nll.tolist(), kl.tolist(), 2000 + number, spread * (1 + number))
            identity = Identity(**{**IDENTITY, "method": method, "number": number})
            values = {"storage": "packed", "quantizes": method != "fp16", "packed_tokens_read": 9}
            usage = {"cache_bytes": 1000 + number, "bits_per_element": 2.5, "seconds": 2.0}
            found.append(make_row(identity, scores, **{**values, **usage, **changes}))
        return found

    return make


def test_numbers(rows: Any) -> None:
    baseline, mine = rows("fp16", 0.0), rows("rtn_int2", 0.5)
    (table,) = build_tables([*mine, *baseline])
    line = {each.method: each for each in table.lines}["rtn_int2"]
    kl, nll, old = (
        np.array([getattr(row, name) for row in many])
        for many, name in ((mine, "kl"), (mine, "nll"), (baseline, "nll"))
    )
    assert [each.method for each in table.lines] == ["fp16", "rtn_int2"]
    means = kl.mean(1)
    assert line.kl is not None and line.tails is not None
    assert line.kl.mean == pytest.approx(means.mean())
    assert line.kl.standard_error == pytest.approx(means.std(ddof=1) / 2)
    assert line.tails[0.99] == pytest.approx(np.quantile(kl, 0.99))
    assert line.tails[0.999] == pytest.approx(np.quantile(kl, 0.999))  # of 10,000 positions
    assert line.worst == kl.max(1).argmax()
    assert line.top1 == pytest.approx((2000 + 2001 + 2002 + 2003) / (4 * POSITIONS))
    assert line.delta_p == pytest.approx(np.sqrt(0.5 * 2.5))
    assert line.perplexity == pytest.approx(np.exp(nll.mean()))
    assert line.ratio == pytest.approx(np.exp((nll - old).mean()))
    assert (line.bits, line.cache_bytes, line.tokens_read) == (2.5, 1001.5, 9)
    assert line.interval and line.interval.low < line.perplexity < line.interval.high
    # Windows differ, positions hardly: an interval over positions would be narrower.
    spread = line.interval.high - line.interval.low
    assert spread > 4 * line.perplexity * nll.std() / np.sqrt(nll.size)


def test_few_positions_have_no_far_tail(rows: Any) -> None:
    (table,) = build_tables(rows("rtn_int2", 0.5, windows=3))
    assert table.lines[0].tails is not None and table.lines[0].tails[0.999] is None


def test_what_failed_is_flagged(rows: Any) -> None:
    failed = dict.fromkeys(("nll", "kl", "agreeing", "delta_p_squared"))
    failed |= {"status": "error", "error": "no quantized token was read"}
    all_rows = [*rows("fp16", 0.0), *rows("kivi", 0.1, windows=2), *rows("skvq", 0.1, **failed)]
    (table,) = build_tables(all_rows)
    lines = {line.method: line for line in table.lines}
    assert lines["skvq"].perplexity is None and lines["skvq"].kl is None
    markdown = perplexity_markdown([table])
    assert "no quantized token was read; 0 of 4 windows" in markdown
    assert "2 of 4 windows" in markdown


def test_mixed_calibrations_have_no_score(rows: Any) -> None:
    mixed = rows("skvq", 0.1)
    mixed[1] = dataclasses.replace(mixed[1], calibration="other")
    (table,) = build_tables(mixed)
    assert table.lines[0].kl is None and table.lines[0].failures == ("mixed calibrations",)


def test_settings_are_never_mixed(rows: Any) -> None:
    other = [dataclasses.replace(row, protocol="exact_prefill") for row in rows("kivi", 0.1)]
    tables = build_tables([*other, *rows("kivi", 0.1)])
    assert [table.setting.protocol for table in tables] == ["quantized_prefill", "exact_prefill"]
    lines = list(csv.DictReader(perplexity_csv(tables).splitlines()))
    assert [line["protocol"] for line in lines] == ["quantized_prefill", "exact_prefill"]
    assert lines[0]["windows"] == lines[0]["expected"] == "4"


def test_the_header_says_what_was_calibrated_on(rows: Any) -> None:
    calibrated = rows("skvq", 0.1)
    calibrated = [dataclasses.replace(row, calibration="abc") for row in calibrated]
    run = {"request": {"command": "kvbench perplexity --limit 4"}, "environment": {"packages": {}}}
    markdown = perplexity_markdown(build_tables(calibrated), run)
    assert "skvq on windows from the end of the same text, none of which is scored" in markdown
    assert "`kvbench perplexity --limit 4`" in markdown
