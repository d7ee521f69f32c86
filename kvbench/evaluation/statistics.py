"""Statistics of answers judged right or wrong, and of the same answers under two caches.

Two methods answer the same samples, so every comparison is paired: a test for independent samples
would miss real differences and see others that aren't there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
TAIL_POSITIONS = 10_000
"""Positions from which on the 99.9 % quantile is printed: it rests on a thousandth of them."""

_QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
_ITEM_RESAMPLES = 1_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` items with its standard error; the error of a single item is None."""

    mean: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Paired:
    """The same ``n`` samples under a baseline and another method, counted.

    ``lost`` were right and became wrong (b of McNemar's table), ``gained`` the other way round (c).
    """

    n: int
    lost: int
    gained: int

    @property
    def difference(self) -> float:
        """Accuracy of the method less that of the baseline, -1 to 1."""
        return (self.gained - self.lost) / self.n

    @property
    def flips(self) -> float:
        """Share of samples whose correctness changed either way (arXiv 2407.09141)."""
        return (self.gained + self.lost) / self.n

    @property
    def p(self) -> float:
        """Two-sided p of the exact McNemar test."""
        return mcnemar(self.lost, self.gained)


def pair(baseline: Sequence[bool], method: Sequence[bool]) -> Paired:
    """Count a paired comparison; item i of both is the same sample.

    Raises:
        ValueError: The lengths differ, or there is no sample.
    """
    if len(baseline) != len(method) or not baseline:
        raise ValueError(
            f"need equally many samples, at least one: got {len(baseline)} and {len(method)}"
        )
    lost = sum(before and not after for before, after in zip(baseline, method, strict=True))
    gained = sum(after and not before for before, after in zip(baseline, method, strict=True))
    return Paired(len(baseline), lost, gained)


def wilson(successes: int, n: int) -> Interval:
    """Return Wilson's score interval of a share, without continuity correction.

    Source: E. B. Wilson, Journal of the American Statistical Association 22, 1927, 209-212.

    Raises:
        ValueError: ``n`` is 0, or ``successes`` is not in 0..n.
    """
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p of the exact McNemar test; 1 where nothing changed.

    It is min(1, 2 sum_{k <= min(b, c)} C(b+c, k) / 2^(b+c)) with b = lost and c = gained.
    """
    if lost + gained == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + gained, 0.5).pvalue)


def corrected_level(flips: Sequence[int], alpha: float = 0.05) -> float:
    """Return the level at which each of several exact McNemar tests has to be read.

    Together they then find a difference where there is none with a chance of at most ``alpha``,
    however the tests depend on each other. A test with f flips has no p below 2^(1-f), so only
    those count that can reach the level at all: it is alpha / K with the smallest K such that no
    more than K tests can reach it (Tarone, Biometrics 46, 1990, 515-522).

    Args:
        flips: For each test the samples whose correctness changed either way.
        alpha: Level of all tests together.
    """
    for count in range(1, len(flips)):
        if sum(2.0 ** (1 - f) <= alpha / count for f in flips) <= count:
            return alpha / count
    return alpha / max(len(flips), 1)


def smallest_loss(n: int, gained: int = 0, level: float = 0.05) -> int | None:
    """Return how few lost answers the exact McNemar test tells from chance, beside those gained.

    Args:
        n: Samples.
        gained: Answers that were wrong and became right.
        level: Of the test, two-sided.

    Returns:
        The number, above ``gained``; None where ``n`` samples are too few for any.
    """
    possible = range(gained + 1, n - gained + 1)
    return next((lost for lost in possible if mcnemar(lost, gained) < level), None)


def bootstrap_difference(
    tasks: Sequence[Paired],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of the accuracy difference, averaged over tasks.

    All tasks weigh the same. Samples are redrawn with replacement within each task. A sample's
    difference is -1, 0 or 1, so redrawing a task's n samples is one draw of the multinomial
    distribution over its lost, unchanged and gained samples.

    Raises:
        ValueError: There is no task.
    """
    if not tasks:
        raise ValueError("need at least one task")
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for task in tasks:
        shares = np.array([task.lost, task.n - task.lost - task.gained, task.gained]) / task.n
        counts = rng.multinomial(task.n, shares, size=resamples)
        total += (counts[:, 2] - counts[:, 0]) / task.n
    return _percentiles(total / len(tasks), confidence)


def bootstrap_accuracy(tasks: Sequence[tuple[int, int]]) -> Interval:
    """Return the percentile bootstrap interval of the accuracy averaged over tasks.

    Args:
        tasks: For each task its right answers and its samples.

    Raises:
        ValueError: There is no task.
    """
    return bootstrap_difference([Paired(n, 0, right) for right, n in tasks])


def mean_of_items(items: Sequence[ArrayLike]) -> Estimate:
    """Average positions within each item, then the items, so that long answers don't dominate.

    Args:
        items: For each sample the values at its positions (for instance KL in nats), or their
            mean as a single number.

    Raises:
        ValueError: There is no item, or one without positions.
    """
    means = [_mean(np.atleast_1d(np.asarray(item, dtype=np.float64))) for item in items]
    if not means:
        raise ValueError("need at least one item")
    mean = math.fsum(means) / len(means)
    if len(means) == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((item - mean) ** 2 for item in means) / (len(means) - 1)
    return Estimate(mean, math.sqrt(variance / len(means)), len(means))


def tail(positions: ArrayLike) -> Mapping[float, float | None]:
    """Return the 50, 90, 95, 99 and 99.9 % quantiles of values pooled over positions.

    The last is None below `TAIL_POSITIONS` positions.

    Raises:
        ValueError: There is no position.
    """
    values = np.asarray(positions, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("need at least one position")
    enough = values.size >= TAIL_POSITIONS
    return {q: float(np.quantile(values, q)) if q < 0.999 or enough else None for q in _QUANTILES}


def bootstrap_items(
    items: Sequence[ArrayLike], statistic: Callable[[NDArray[np.float64]], float]
) -> Interval | None:
    """Return the percentile bootstrap interval of a statistic of all positions of all items.

    Whole items are redrawn with replacement: positions of one item depend on each other.

    Args:
        items: For each item an array whose first axis is its positions.
        statistic: From the positions of some items, joined, to a number.

    Returns:
        The interval; None for a single item, which says nothing of others.
    """
    if len(items) < 2:
        return None
    arrays = [np.asarray(item, dtype=np.float64) for item in items]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(arrays), (_ITEM_RESAMPLES, len(arrays)))
    values = [statistic(np.concatenate([arrays[index] for index in row])) for row in drawn]
    return _percentiles(np.array(values), CONFIDENCE)


def detectable_difference(
    n: int, flips: float, *, alpha: float = 0.05, power: float = 0.8
) -> float | None:
    """Return the smallest accuracy difference that a paired test finds with the given power.

    With a share f of flips, Connor (Biometrics 43, 1987, 207-211) needs
    n = (z_a sqrt(f) + z_b sqrt(f - d^2))^2 / d^2 samples for a difference d, where z_a and z_b are
    the normal quantiles of 1 - alpha/2 and of the power. Solved for d, this is
    d = sqrt(f) (z_a sqrt(n) + z_b sqrt(n + z_b^2 - z_a^2)) / (n + z_b^2).

    Args:
        n: Samples.
        flips: Share of samples whose correctness changes either way.
        alpha: Two-sided level of the test.
        power: Chance to find the difference.

    Returns:
        The difference, 0 to 1. None where it would exceed the flips, which is impossible.

    Raises:
        ValueError: ``n`` is below 1, or ``flips`` is not in 0..1.
    """
    if n < 1 or not 0 <= flips <= 1:
        raise ValueError(f"need n >= 1 and flips in 0..1: got {n} and {flips}")
    z_a, z_b = (float(stats.norm.ppf(q)) for q in (1 - alpha / 2, power))
    root = n + z_b**2 - z_a**2
    if root < 0:
        return None
    difference = math.sqrt(flips) * (z_a * math.sqrt(n) + z_b * math.sqrt(root)) / (n + z_b**2)
    return difference if 0 < difference <= flips else None


def _mean(values: NDArray[np.float64]) -> float:
    if values.size == 0:
        raise ValueError("an item has no positions")
    return math.fsum(values) / values.size


def _percentiles(values: NDArray[np.float64], confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
