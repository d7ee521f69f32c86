"""Tables and figures made of result rows and of nothing else."""

from __future__ import annotations

from kvbench.report.efficiency_tables import efficiency_text
from kvbench.report.lm_eval import lm_eval_text
from kvbench.report.perplexity import perplexity_text
from kvbench.report.table2 import leaderboard_markdown
from kvbench.report.terminal import print_summary
from kvbench.report.write import read_results, read_tables, write_efficiency, write_report

__all__ = [
    "efficiency_text",
    "leaderboard_markdown",
    "lm_eval_text",
    "perplexity_text",
    "print_summary",
    "read_results",
    "read_tables",
    "write_efficiency",
    "write_report",
]
