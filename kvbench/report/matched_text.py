"""A text read through caches of matched bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvbench.evaluation.statistics import CONFIDENCE
from kvbench.report.matched_results import Results
from kvbench.report.perplexity import (
    Line,
    PerplexityTable,
    flags,
    ranged,
    table_header,
    table_title,
)
from kvbench.report.text import MISSING, amount, number, percent
from kvbench.report.write import read_run, read_tables


class TextResults(Results):
    """One table of perplexities."""

    notes = f"""\
"Bits" and bytes are those of all windows, each with all of its tokens in the cache. Smallest KL
first: KL(fp16 || method) in nats at every scored position, teacher-forced, mean over a window's
positions, then over windows. Top-1: positions at which the most probable token is FP16's. Times
FP16: perplexity over FP16's on the same windows. Intervals are {CONFIDENCE:.0%}, by bootstrap over
windows. FP16's own row is a second pass held against the first."""
    headers = ("Bits", "KL", "Top-1 %", "Times FP16", "Windows", "Cache bytes", "Flags")
    columns = (
        "bits_per_element", "cache_bytes", "windows", "kl_mean", "kl_mean_low", "kl_mean_high",
        "top1", "perplexity", "ratio", "ratio_low", "ratio_high", "flags",
    )  # fmt: skip
    axis = "KL(FP16 || method), nats"
    scale = "log"

    def __init__(self, table: PerplexityTable, run: Mapping[str, Any]) -> None:
        """Of a table and the content of ``run.json``."""
        self._table, self._run = table, run
        self._lines = {line.method: line for line in table.lines}

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The table's setting."""
        return asdict(self._table.setting)

    @property
    def title(self) -> str:
        """Model, protocol, text and length."""
        return table_title(self._table.setting)

    @property
    def header(self) -> str:
        """As above the table of perplexities."""
        return table_header(self._table, self._run)

    @property
    def file(self) -> str:
        """Model, protocol and length."""
        setting = self._table.setting
        return f"{setting.model}_{setting.protocol}_{setting.window}"

    def cells(self, method: str) -> list[str]:
        """Bits, divergence and perplexity."""
        line = self._line(method)
        return [
            MISSING if line.bits is None else f"{line.bits:.2f}",
            ranged(line.kl.mean if line.kl else None, line.kl_interval, 3),
            percent(line.top1),
            ranged(line.ratio, line.ratio_interval),
            str(line.windows),
            amount(line.cache_bytes),
            flags(line) or MISSING,
        ]

    def values(self, method: str) -> list[str]:
        """Shares in percent, KL in nats."""
        line = self._line(method)
        kl, ratio = (
            (interval.low, interval.high) if interval else (None, None)
            for interval in (line.kl_interval, line.ratio_interval)
        )
        top1 = None if line.top1 is None else 100 * line.top1
        return [
            *map(number, (line.bits, line.cache_bytes)),
            str(line.windows),
            *map(number, (line.kl.mean if line.kl else None, *kl, top1)),
            *map(number, (line.perplexity, line.ratio, *ratio)),
            flags(line),
        ]

    def loss(self, method: str) -> float:
        """Mean KL."""
        kl = self._line(method).kl
        return kl.mean if kl else math.inf

    def point(self, method: str) -> tuple[float | None, float] | None:
        """Mean KL; zero has no place on a logarithmic axis."""
        line = self._line(method)
        return (line.bits, line.kl.mean) if line.kl and line.kl.mean > 0 else None

    def exact(self) -> float | None:
        """FP16's KL is zero by definition."""
        return None

    def _line(self, method: str) -> Line:
        return self._lines.get(method, Line(method, 0, 0))


def text_results(directory: Path) -> Sequence[TextResults]:
    """A table for each setting of a folder's rows.

    Raises:
        UserError: the folder has no rows, or a line is broken.
    """
    run = read_run(directory)
    return [TextResults(table, run) for table in read_tables(directory)]
