"""Everything a search has proposed, a line each: what it takes to go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvbench.evaluation.lines import Kind
from kvbench.evaluation.typed import check_types, fields_of, to_line
from kvbench.tuning.objective import Outcome

SCHEMA = 1


@dataclass(frozen=True)
class Proposal:
    """A choice for each cluster and what came of it.

    Raises:
        UserError: A field has the wrong type.
    """

    schema: int
    """Version of this layout."""
    number: int
    chosen: dict[str, str]
    """Choices by the clusters' numbers."""
    table: list[str]
    """Choices by layer."""
    bits: float
    nbytes: float
    kl: float | None
    """None, as the next, where the table is larger than the budget: it was not run."""
    accuracy: float | None
    sampler: dict[str, Any]
    """What Optuna's sampler notes of a trial."""

    def __post_init__(self) -> None:
        """Check every field's type."""
        check_types(self)

    @property
    def key(self) -> str:
        """Tells it from all others."""
        return str(self.number)

    @property
    def status(self) -> str:
        """Proposals need no other try."""
        return "ok"

    @property
    def outcome(self) -> Outcome | None:
        """What the model made of it, if it was run."""
        if self.kl is None or self.accuracy is None:
            return None
        return Outcome(self.kl, self.accuracy)

    def to_json(self) -> str:
        """Return the proposal as one line of JSON, without the newline."""
        return to_line(self)


def _parse(line: str) -> Proposal:
    return Proposal(**fields_of(line, Proposal, SCHEMA))


PROPOSALS = Kind("proposals.jsonl", "proposals", _parse)
