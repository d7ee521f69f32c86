"""Tables made of result rows and of nothing else: Markdown, CSV and the terminal."""

from __future__ import annotations

from kvbench.report.table2 import leaderboard_markdown
from kvbench.report.terminal import print_summary
from kvbench.report.write import read_results, write_report

__all__ = ["leaderboard_markdown", "print_summary", "read_results", "write_report"]
