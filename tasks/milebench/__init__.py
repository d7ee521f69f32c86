"""MileBench (arXiv 2404.18532): the twelve tasks of the AKVQ-VL paper's Table II.

Also easy-VQA, whose images and questions are somebody else's but are written in the same layout.
"""

from __future__ import annotations

from kvbench.tasks.images import open_image
from kvbench.tasks.milebench.catalog import TASKS
from kvbench.tasks.milebench.check import TaskReport, check, report_rows
from kvbench.tasks.milebench.prompt import newline_rule
from kvbench.tasks.milebench.task import MileBenchTask

__all__ = [
    "TASKS",
    "MileBenchTask",
    "TaskReport",
    "check",
    "newline_rule",
    "open_image",
    "report_rows",
]
