"""A run held against an earlier one, sample by sample: what got worse, and whether it is real."""

from __future__ import annotations

from kvbench.report.regression.baseline import read_outcomes, save_baseline
from kvbench.report.regression.check import check
from kvbench.report.regression.junit import junit_xml
from kvbench.report.regression.result import Comparison, Limits
from kvbench.report.regression.text import comparison_markdown, comparison_text

__all__ = [
    "Comparison",
    "Limits",
    "check",
    "comparison_markdown",
    "comparison_text",
    "junit_xml",
    "read_outcomes",
    "save_baseline",
]
