"""The largest batch that completes, found by running out of memory as seldom as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvbench.efficiency.request import TrialResult

LARGEST = 1 << 16
"""No search goes beyond this batch."""

Attempt = Callable[[int], TrialResult]


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        largest: The largest batch that completed; 0 if none did.
        out_of_memory_at: The smallest that ran out of memory; None if none did.
        tries: How many batches were tried.
        last: The last try. Its status is ``failed`` or ``timeout`` if that ended the search.
    """

    largest: int
    out_of_memory_at: int | None
    tries: int
    last: TrialResult

    @property
    def broken(self) -> bool:
        """Whether the search ended because a try failed otherwise than for want of memory."""
        return self.last.status in ("failed", "timeout")


def largest_batch(attempt: Attempt, hint: int | None = None, tolerance: float = 0.0) -> Found:
    """Double from 1 until memory runs out, then bisect; a hint starts near the end instead.

    From a hint on, the batch moves by growing steps towards the limit, so that a good hint costs
    two tries and a bad one twice the doublings of its distance. Without a hint there are at most
    2 log2(largest) + 3 tries. Only ``oom`` says that a batch is too large; with ``failed`` or
    ``timeout`` the search ends.

    Args:
        attempt: Tries a batch. What completes must do so in smaller batches as well.
        hint: A guess of the answer.
        tolerance: Ends the search when the answer is known to this share of itself.
    """
    low, high, tries = 0, LARGEST + 1, 0
    batch = min(max(hint or 1, 1), LARGEST)
    step = max(1, int(tolerance * batch)) if hint else 1
    while True:
        last = attempt(batch)
        tries += 1
        if last.status == "ok":
            low = batch
        elif last.status == "oom":
            high = batch
        met = low > 0 and high <= LARGEST
        if last.status not in ("ok", "oom") or high - low <= max(1, int(tolerance * low)):
            return Found(low, high if high <= LARGEST else None, tries, last)
        if met:
            batch = (low + high) // 2
        elif low:
            batch = min(low + (step if hint else low), LARGEST)
        else:
            batch = max(high - step, 1)
        step *= 2


def completed(attempt: Attempt, batch: int) -> tuple[int, TrialResult, int]:
    """Measure `batch`, or the next smaller ones while memory runs out.

    A full run may need more than the try that found its batch. Steps start at 2 % and double.

    Returns:
        The batch, 0 if even one row runs out of memory; the last result; the number of runs.
    """
    step, runs = max(1, batch // 50), 0
    while True:
        result = attempt(batch)
        runs += 1
        if result.status != "oom" or batch == 1:
            return (0 if result.status == "oom" else batch), result, runs
        batch = max(1, batch - step)
        step *= 2
