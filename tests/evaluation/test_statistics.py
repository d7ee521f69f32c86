"""Statistics against published values, hand calculation and independent numpy code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvbench.evaluation.statistics import (
    Estimate,
    Interval,
    Paired,
    bootstrap_accuracy,
    bootstrap_difference,
    corrected_level,
    detectable_difference,
    mcnemar,
    mean_of_items,
    pair,
    smallest_loss,
    tail,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17, 1998, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_intervals(right: int, n: int, low: float, high: float) -> None:
    interval = wilson(right, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(right: int, n: int) -> None:
    with pytest.raises(ValueError):
        wilson(right, n)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (6, 2, 2 * (1 + 8 + 28) / 2**8),
        (2, 6, 2 * (1 + 8 + 28) / 2**8),
        (0, 5, 2 / 2**5),
        (27, 4, 2 * (1 + 31 + 465 + 4495 + 31465) / 2**31),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_sum(lost: int, gained: int, p: float) -> None:
    assert mcnemar(lost, gained) == pytest.approx(p, rel=1e-9)


def test_pairs_are_counted_by_what_changed() -> None:
    before = [True, True, True, False, False, False, True, False]
    after = [True, False, False, True, False, False, True, False]
    counts = pair(before, after)
    assert counts == Paired(n=8, lost=2, gained=1)
    assert counts.difference == -1 / 8
    assert counts.flips == 3 / 8
    assert counts.p == 1.0


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_pairs_need_the_same_samples(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(ValueError, match="equally many"):
        pair(before, after)


def test_bootstrap_equals_redrawing_samples_by_index() -> None:
    differences = np.array([-1] * 30 + [0] * 150 + [1] * 20)
    drawn = np.random.default_rng(5).integers(0, 200, size=(20_000, 200))
    low, high = np.quantile(differences[drawn].mean(axis=1), [0.025, 0.975])
    interval = bootstrap_difference([Paired(200, 30, 20)])
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)


def test_bootstrap_gives_every_task_the_same_weight() -> None:
    # Means -0.2 and +0.1; variances of a sample 0.2 - 0.2^2 and 0.1 - 0.1^2.
    interval = bootstrap_difference([Paired(100, 20, 0), Paired(1000, 0, 100)])
    spread = 1.959964 * math.sqrt(0.16 / 100 + 0.09 / 1000) / 2
    assert interval.low == pytest.approx(-0.05 - spread, abs=0.003)
    assert interval.high == pytest.approx(-0.05 + spread, abs=0.003)


def test_bootstrap_depends_on_the_seed_alone() -> None:
    task = [Paired(40, 7, 3)]
    assert bootstrap_difference(task) == bootstrap_difference(task)
    assert bootstrap_difference(task, resamples=50) != bootstrap_difference(
        task, resamples=50, seed=1
    )


def test_bootstrap_of_unchanged_answers_is_a_point() -> None:
    assert bootstrap_difference([Paired(50, 0, 0)]) == Interval(0.0, 0.0)


def test_bootstrap_of_the_accuracy_is_about_the_normal_interval() -> None:
    interval = bootstrap_accuracy([(120, 200), (80, 200)])
    spread = 1.959964 * math.sqrt(0.24 / 200 + 0.24 / 200) / 2
    assert interval.low == pytest.approx(0.5 - spread, abs=0.004)
    assert interval.high == pytest.approx(0.5 + spread, abs=0.004)


@pytest.mark.parametrize("function", [bootstrap_difference, bootstrap_accuracy, mean_of_items])
def test_nothing_has_no_interval(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="at least one"):
        function([])


def test_positions_are_averaged_within_items_first() -> None:
    # Item means 2 and 5: mean 3.5, sample deviation sqrt(4.5), over sqrt(2) items 1.5.
    estimate = mean_of_items([[1.0, 3.0], [5.0]])
    assert estimate == Estimate(3.5, pytest.approx(1.5), 2)
    assert mean_of_items([0.25]) == Estimate(0.25, None, 1)
    with pytest.raises(ValueError, match="no positions"):
        mean_of_items([[1.0], []])


def test_the_last_quantile_needs_ten_thousand_positions() -> None:
    few, enough = tail(np.arange(9_999)), tail(np.arange(10_000)[::-1])
    assert few[0.999] is None
    assert few[0.5] == 4999.0
    assert few[0.99] == pytest.approx(9898.02)
    assert enough[0.999] == pytest.approx(9989.001)
    with pytest.raises(ValueError, match="at least one"):
        tail([])


@pytest.mark.parametrize(("n", "flips"), [(200, 0.1), (200, 0.4), (2400, 0.05), (50, 0.9)])
def test_the_detectable_difference_solves_connors_equation(n: int, flips: float) -> None:
    d = detectable_difference(n, flips)
    assert d is not None
    needed = (1.959964 * math.sqrt(flips) + 0.841621 * math.sqrt(flips - d * d)) ** 2 / d**2
    assert needed == pytest.approx(n, rel=1e-5)


def test_the_detectable_difference_by_hand() -> None:
    assert detectable_difference(200, 0.1) == pytest.approx(0.06228, abs=1e-5)


@pytest.mark.parametrize(("n", "flips"), [(200, 0.0), (20, 0.05), (1, 0.5)])
def test_too_few_flips_show_no_difference(n: int, flips: float) -> None:
    assert detectable_difference(n, flips) is None


@pytest.mark.parametrize(("n", "flips"), [(0, 0.5), (10, -0.1), (10, 1.1)])
def test_impossible_shares_are_refused(n: int, flips: float) -> None:
    with pytest.raises(ValueError, match="need n"):
        detectable_difference(n, flips)


@pytest.mark.parametrize(
    ("flips", "level"),
    [
        ([], 0.05),
        ([9], 0.05),
        ([0, 1, 5], 0.05),  # none can reach 0.05: 2^-4 is the least
        ([6, 0, 1, 5], 0.05),  # one can
        ([6, 6], 0.025),  # two can reach 0.05, none 0.025
        ([7, 7], 0.025),  # 2^-6 = 0.0156
        ([7, 6], 0.05 / 2),  # K = 1 won't do: both reach 0.05; of 0.025 only one is left
        ([20] * 10, 0.005),
    ],
)
def test_only_tests_that_can_show_anything_share_the_level(flips: list[int], level: float) -> None:
    assert corrected_level(flips) == pytest.approx(level)


def test_many_tests_of_nothing_rarely_find_something() -> None:
    """Twenty tests on coins of few to many flips: at least one alarm in at most 5 % of runs."""
    rng = np.random.default_rng(0)
    flips = [int(count) for count in rng.integers(0, 40, 20)]
    level = corrected_level(flips)
    lost = rng.binomial(flips, 0.5, size=(2000, len(flips)))
    known = {(f, k): mcnemar(k, f - k) < level for f in set(flips) for k in range(f + 1)}
    alarms = sum(any(known[f, int(k)] for f, k in zip(flips, row, strict=True)) for row in lost)
    assert alarms <= 0.05 * 2000


@pytest.mark.parametrize(
    ("n", "gained", "level", "lost"),
    [
        (200, 0, 0.05, 6),
        (200, 0, 0.001, 11),
        (5, 0, 0.05, None),
        (6, 0, 0.05, 6),
        (200, 5, 0.05, 15),
    ],
)
def test_the_smallest_loss_that_shows(n: int, gained: int, level: float, lost: int | None) -> None:
    assert smallest_loss(n, gained, level) == lost
    if lost is not None:
        assert mcnemar(lost, gained) < level <= mcnemar(lost - 1, gained)
