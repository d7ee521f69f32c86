"""What a match is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvbench.errors import UserError
from kvbench.matching.evaluations import Evaluation
from kvbench.specs import split_specs


@dataclass(frozen=True)
class MatchRequest:
    """Sizes to bring methods to, and the evaluation that then compares them.

    Attributes:
        evaluation: Models, methods, and what they are compared on.
        budgets: Stored bits an element, metadata and exact tokens counted.

    Raises:
        UserError: There are no budgets.
    """

    evaluation: Evaluation
    budgets: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
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
