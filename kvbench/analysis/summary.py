"""Means over prompts with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.evaluation.statistics import CONFIDENCE

RESAMPLES = 2000
_SMALLEST = 1e-12
"""Stands for attention of 0 where a ratio is taken."""


@dataclass(frozen=True)
class Mean:
    """A mean over prompts and its 95 % interval, whose ends are None for a single prompt."""

    value: float
    low: float | None
    high: float | None


def mean(values: Sequence[float]) -> Mean:
    """Arithmetic mean with the percentile bootstrap's interval, which stays among the values.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("need at least one value")
    found = np.asarray(values, dtype=np.float64)
    if len(found) == 1:
        return Mean(float(found[0]), None, None)
    drawn = np.random.default_rng(0).integers(len(found), size=(RESAMPLES, len(found)))
    ends = np.quantile(found[drawn].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Mean(float(found.mean()), float(ends[0]), float(ends[1]))


def mean_or_none(values: Sequence[float | None]) -> Mean | None:
    """The mean of the values that are there, or None."""
    present = [value for value in values if value is not None]
    return mean(present) if present else None


def geometric_mean(values: Sequence[float]) -> Mean:
    """Geometric mean with the interval of the logarithms' mean.

    Raises:
        ValueError: there is no value.
    """
    of_logs = mean([math.log(value) for value in values])
    low, high = (None if end is None else math.exp(end) for end in (of_logs.low, of_logs.high))
    return Mean(math.exp(of_logs.value), low, high)


def ratio(above: float, below: float) -> float:
    """A quotient of two weights that stays positive and finite where one of them is 0."""
    return max(above, _SMALLEST) / max(below, _SMALLEST)
