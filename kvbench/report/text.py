"""Numbers and foreign text as table cells: Markdown, CSV and terminal."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from kvbench.evaluation.statistics import Estimate, Interval

MISSING = "-"

_SPECIAL = re.compile(r"[\\`*|~$]|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])")


def plain(text: str) -> str:
    """Return text on one line without control and format characters."""
    kept = (" " if unicodedata.category(char)[0] in "CZ" else char for char in text)
    return " ".join("".join(kept).split())


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, also inside a table."""
    html = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda match: f"\\{match[0]}", html)


def code(text: str) -> str:
    """Return text as a Markdown code span (not for table cells, where a pipe would end it)."""
    text = plain(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[str]], texts: int) -> str:
    """Return a table in GitHub's Markdown, everything escaped; the first columns are texts.

    Args:
        headers: Column titles.
        lines: Cells, as plain text.
        texts: Columns that are aligned to the left; the others to the right.
    """
    return tabulate(
        [[escape(cell) for cell in line] for line in lines],
        headers=[escape(header) for header in headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["left"] * texts + ["right"] * (len(headers) - texts),
    )


def csv_text(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return lines as CSV with a header; every line ends in a line feed."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows([plain(cell) for cell in line] for line in lines)
    return buffer.getvalue()


def number(value: float | None) -> str:
    """Return a number for CSV, ten digits; empty where there is none."""
    return "" if value is None else f"{value:.10g}"


def percent(share: float | None, sign: str = "") -> str:
    """Return a share as percent with one decimal; ``sign="+"`` for differences."""
    return MISSING if share is None else f"{_no_minus_zero(100 * share, 1):{sign}.1f}"


def percent_range(value: float, interval: Interval, sign: str = "") -> str:
    """Return a share with its interval, in percent: ``53.0 [46.1, 59.8]``."""
    low, high = percent(interval.low, sign), percent(interval.high, sign)
    return f"{percent(value, sign)} [{low}, {high}]"


def estimate(value: Estimate | None) -> str:
    """Return a mean with its standard error, two and three digits."""
    if value is None:
        return MISSING
    error = "" if value.standard_error is None else f" ± {value.standard_error:.2g}"
    return f"{value.mean:.3g}{error}"


def p_value(value: float) -> str:
    """Return a p with three decimals, or that it is smaller."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def amount(value: float | None) -> str:
    """Return a count or bytes, rounded, with separators between thousands."""
    return MISSING if value is None else f"{value:,.0f}"


def several(values: Iterable[object]) -> str:
    """Return values as a comma-separated list; a dash where there is none."""
    return ", ".join(str(value) for value in values) or MISSING


def _no_minus_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0
