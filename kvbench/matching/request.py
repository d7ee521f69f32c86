"""What a match is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbench.errors import UserError
from kvbench.evaluation.request import EvalRequest, at_least
from kvbench.specs import split_specs


@dataclass(frozen=True)
class MatchRequest:
    """Methods to bring to the same sizes, and the evaluation that then compares them.

    Attributes:
        evaluation: Models, methods, tasks and the rest; methods' fields that differ from their
            defaults are kept.
        budgets: Stored bits an element, metadata and exact tokens counted.
        samples: Prompts of the evaluation to measure storage with, drawn evenly from its tasks.

    Raises:
        UserError: A value is out of range.
    """

    evaluation: EvalRequest
    budgets: tuple[float, ...]
    samples: int = 12

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        at_least("samples", self.samples, 1)
        if not self.budgets:
            raise UserError("no bits to match: give at least one number, such as --bits 2.75")


def read_budgets(text: str) -> tuple[float, ...]:
    """Read ``"2.25,2.75,4.25"``; ascending, each once.

    Raises:
        UserError: An item is no positive number.
    """
    found = set()
    for item in split_specs(text):
        try:
            value = float(item)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"--bits has {item!r}: give positive numbers such as 2.25,2.75,4.25")
        found.add(value)
    return tuple(sorted(found))
