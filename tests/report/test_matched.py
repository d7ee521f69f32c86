"""Which settings count as being of a size, once it is known what they stored in the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kvbench.report.matched import Match, _csv_lines, _table
from kvbench.report.matched_results import Results


class Stored(Results):
    """Results of which only the stored bits are known."""

    notes, headers, columns, axis = "", ("Bits",), ("bits",), ""
    conditions: Mapping[str, Any] = {}
    title = header = file = ""

    def __init__(self, bits: dict[str, float]) -> None:
        self._bits = bits

    def cells(self, method: str) -> list[str]:
        return [f"{self._bits.get(method, 16):.2f}"]

    values = cells

    def loss(self, method: str) -> float:
        return self._bits.get(method, 16)

    def point(self, method: str) -> tuple[float | None, float] | None:
        return (self._bits[method], 0.0) if method in self._bits else None

    def exact(self) -> float | None:
        return None


@pytest.fixture
def match() -> Match:
    points = [{"name": name, "method": f"{name}[x=1]", "bits": 2.7} for name in ("near", "far")]
    return Match("tiny", 2.75, points, {"fp16": "stores at least 16.000 bits"})


def test_a_setting_that_stored_more_in_the_run_is_named_with_what_it_stored(match: Match) -> None:
    results = Stored({"near[x=1]": 2.8, "far[x=1]": 3.37})
    table, others = _table(match, results).split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["FP16", "near"]
    assert others == (
        "Not at this size: far (far[x=1] measured 2.700 bits, and stored 3.370 in the run); "
        "fp16 (stores at least 16.000 bits)."
    )
    assert [line[1:3] for line in _csv_lines(match, results)] == [
        ["fp16", "fp16"],
        ["near", "near[x=1]"],
        ["far", ""],
        ["fp16", ""],
    ]


def test_a_setting_without_a_result_keeps_its_place(match: Match) -> None:
    table = _table(match, Stored({})).split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 3
