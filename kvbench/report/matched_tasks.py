"""Answers to tasks at matched bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvbench.defaults import REFERENCE
from kvbench.evaluation.statistics import CONFIDENCE, Interval
from kvbench.report.board import SETTING_COLUMNS, Block, Leaderboard, build
from kvbench.report.cells import Cell
from kvbench.report.header import header, title
from kvbench.report.matched_results import Results
from kvbench.report.table2 import bits, mean_score, percent_number, score
from kvbench.report.text import MISSING, amount, estimate, number, p_value, percent_range
from kvbench.report.write import read_results

_NOTHING = Cell(0, 0, 0)


class TaskResults(Results):
    """One block of the leaderboard."""

    notes = f"""\
"Bits" are those of all samples. Best first. Accuracy in percent, every task weighing the same, with
its {CONFIDENCE:.0%} bootstrap interval; difference to FP16 on the same samples; p: McNemar;
KL(fp16 || method) in nats over the answers' tokens."""
    headers = ("Bits", "Mean", "Interval", "- FP16", "p", "KL", "Cache bytes")
    columns = (
        "bits_per_element", "cache_bytes", "n", "accuracy", "accuracy_low", "accuracy_high",
        "difference", "difference_low", "difference_high", "mcnemar_p", "kl_mean", "kl_mean_se",
    )  # fmt: skip
    axis = "mean accuracy (%)"

    def __init__(self, block: Block, board: Leaderboard) -> None:
        """Of a block."""
        self._block, self._board = block, board

    @property
    def conditions(self) -> Mapping[str, Any]:
        """The block's setting."""
        return {name: getattr(self._block.setting, name) for name in SETTING_COLUMNS}

    @property
    def title(self) -> str:
        """Model and protocol."""
        return title(self._block)

    @property
    def header(self) -> str:
        """As above the leaderboard."""
        return header(self._block, self._board)

    @property
    def file(self) -> str:
        """Model, protocol and data."""
        setting = self._block.setting
        return f"{setting.model}_{setting.protocol}_{setting.dataset}"

    def cells(self, method: str) -> list[str]:
        """Bits, accuracy, and how it stands against FP16."""
        cell, interval = self._cell(method), MISSING
        if cell.accuracy is not None and cell.interval is not None:
            interval = percent_range(cell.accuracy, cell.interval).partition(" ")[2]
        against = cell.comparison
        return [
            bits(cell),
            mean_score(self._block, method) if cell.n else score(cell),
            interval,
            percent_range(against.difference, against.interval, "+") if against else MISSING,
            p_value(against.p) if against else MISSING,
            estimate(cell.kl_mean),
            amount(cell.cache_bytes),
        ]

    def values(self, method: str) -> list[str]:
        """Shares in percent."""
        cell = self._cell(method)
        against, kl = cell.comparison, cell.kl_mean
        shares: list[float | None] = [cell.accuracy, *_ends(cell.interval)]
        shares += [against.difference, *_ends(against.interval)] if against else [None] * 3
        return [
            *map(number, (cell.bits, cell.cache_bytes)),
            str(cell.n),
            *map(percent_number, shares),
            number(against.p if against else None),
            *map(number, (kl.mean, kl.standard_error) if kl else (None, None)),
        ]

    def loss(self, method: str) -> float:
        """Accuracy, the other way round."""
        accuracy = self._cell(method).accuracy
        return math.inf if accuracy is None else -accuracy

    def point(self, method: str) -> tuple[float | None, float] | None:
        """Accuracy in percent."""
        cell = self._cell(method)
        return None if cell.accuracy is None else (cell.bits, 100 * cell.accuracy)

    def exact(self) -> float | None:
        """FP16's accuracy."""
        found = self.point(REFERENCE)
        return found and found[1]

    def _cell(self, method: str) -> Cell:
        return self._block.overall.get(method, _NOTHING)


def task_results(directory: Path) -> Sequence[TaskResults]:
    """A table for each block of a folder's rows.

    Raises:
        UserError: the folder has no rows.
    """
    board = build(*read_results(directory))
    return [TaskResults(block, board) for block in board.blocks]


def _ends(interval: Interval | None) -> Iterable[float | None]:
    return (interval.low, interval.high) if interval else (None, None)
