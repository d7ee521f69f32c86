"""Numbers and foreign text as cells."""

from __future__ import annotations

import pytest

from kvbench.evaluation.statistics import Estimate
from kvbench.report.text import amount, csv_text, estimate, number, p_value, percent


def test_a_share_is_percent_and_never_minus_zero() -> None:
    assert percent(0.535) == "53.5"
    assert percent(0.12, "+") == "+12.0"
    assert percent(-0.0001, "+") == "+0.0"
    assert percent(None) == "-"


def test_numbers_for_csv_keep_every_byte() -> None:
    assert number(123_456_789.0) == "123456789"
    assert number(47.375) == "47.375"
    assert number(None) == ""


@pytest.mark.parametrize(("p", "text"), [(0.0004, "<0.001"), (0.001, "0.001"), (1.0, "1.000")])
def test_a_small_p_is_only_called_small(p: float, text: str) -> None:
    assert p_value(p) == text


def test_means_with_their_errors() -> None:
    assert estimate(Estimate(0.08234, 0.00412, 200)) == "0.0823 ± 0.0041"
    assert estimate(Estimate(0.0027, None, 1)) == "0.0027"
    assert estimate(None) == "-"


def test_amounts_have_separators() -> None:
    assert amount(1_234_567.5) == "1,234,568"


def test_csv_keeps_a_line_a_line() -> None:
    assert csv_text(["a", "b"], [["x,y", "two\r\nlines"]]) == 'a,b\n"x,y",two lines\n'
