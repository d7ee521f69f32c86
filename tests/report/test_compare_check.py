"""The rules of ``kvbench compare``, on made-up rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.report.regression import Limits, check
from kvbench.report.regression.outcomes import outcome
from kvbench.report.regression.result import Comparison, Kind

MakeRows = Callable[..., list[SampleRow]]
STORED = {"bits_per_element": 2.5, "cache_bytes": 1000}


def compared(now: list[SampleRow], before: list[SampleRow], **limits: Any) -> Comparison:
    return check(map(outcome, now), map(outcome, before), Limits(**limits))


def kinds(comparison: Comparison) -> dict[str, list[str]]:
    """Kinds of fault by task, of the only method."""
    (method,) = comparison.methods
    found: dict[str, list[str]] = {}
    for kind, lines in method.faults.items():
        for line in lines:
            found.setdefault(line.key.task, []).append(kind.name)
    return found


@pytest.fixture
def before(make_rows: MakeRows) -> list[SampleRow]:
    """Two tasks of forty samples."""
    rows = [make_rows("kivi", task, "+" * 30 + "-" * 10, **STORED) for task in ("oe", "st")]
    return rows[0] + rows[1]


def changed(rows: list[SampleRow], task: str, count: int, **fields: Any) -> list[SampleRow]:
    """The first `count` samples of a task with other fields; each row's key says so."""
    return [
        dataclasses.replace(row, key=f"{row.key}'", **fields)
        if row.task == task and row.sample_id < count
        else row
        for row in rows
    ]


def test_the_same_rows_in_another_order_are_fine(before: list[SampleRow]) -> None:
    now = random.Random(0).sample(before, len(before))
    result = compared(now, before)
    assert result.ok
    assert result.notes == ()
    (method,) = result.methods
    assert (method.mean.before, method.mean.now, method.mean.difference) == (0.75, 0.75, 0)


@pytest.mark.parametrize(
    ("lost", "dropped"),
    [(5, {}), (7, {"mean": ["DROP"], "oe": ["DROP"]})],
)
def test_a_drop_counts_once_it_is_no_chance(
    before: list[SampleRow], lost: int, dropped: dict[str, list[str]]
) -> None:
    """Two tests share 5 %: 5 lost of 5 flips have p = 0.06, 7 of 7 have 0.016 < 0.05 / 2."""
    result = compared(changed(before, "oe", lost, correct=False), before)
    assert kinds(result) == dropped
    assert result.ok == (not dropped)


def test_a_drop_in_the_mean_alone_counts(before: list[SampleRow]) -> None:
    now = changed(changed(before, "oe", 4, correct=False), "st", 4, correct=False)
    assert kinds(compared(now, before)) == {"mean": ["DROP"]}


def test_losses_beside_as_many_gains_are_chance(before: list[SampleRow]) -> None:
    now = [dataclasses.replace(row, correct=row.sample_id >= 10) for row in before]
    (method,) = compared(now, before).methods
    assert (method.mean.counts.lost, method.mean.counts.gained) == (20, 20)
    assert not method.faults


def test_a_gain_is_fine(before: list[SampleRow]) -> None:
    now = [dataclasses.replace(row, correct=True) for row in before]
    assert compared(now, before).ok


def test_a_real_drop_within_the_limit_is_let_pass(before: list[SampleRow]) -> None:
    now = changed(before, "oe", 8, correct=False)
    assert kinds(compared(now, before, max_drop=19.9)) == {"oe": ["DROP"]}
    assert compared(now, before, max_drop=20.0).ok


def test_many_tasks_of_noise_raise_no_alarm(make_rows: MakeRows) -> None:
    """Twenty runs of 12 tasks in which a fifth of the answers are a coin's: 5 % may alarm."""
    alarms = 0
    for seed in range(20):
        coin = random.Random(seed)
        runs = [
            [
                row
                for task in range(12)
                for row in make_rows(
                    "kivi", f"t{task:02}", "+" * 32 + "".join(coin.choices("+-", k=8))
                )
            ]
            for _ in range(2)
        ]
        alarms += not compared(*runs).ok
    assert alarms <= 3


@pytest.mark.parametrize(
    ("task", "count", "fields", "expected"),
    [
        ("oe", 40, {"prompt_sha256": "other"}, ["PROMPT"]),
        ("oe", 1, {"prompt_sha256": "other"}, ["PROMPT"]),
        ("oe", 1, {"images_sha256": "other"}, ["IMAGES"]),
        ("oe", 40, {"dataset": "toys-2"}, ["DATA"]),
        ("oe", 40, {"task_version": 2}, ["DATA"]),
        ("oe", 40, {"bits_per_element": 2.6}, ["BITS"]),
        ("oe", 40, {"bits_per_element": None}, ["BITS"]),
        ("oe", 40, {"cache_bytes": 1006}, ["BYTES"]),
        ("oe", 40, {"storage": "simulated"}, ["BYTES"]),
        ("oe", 2, {"packed_tokens_read": 0}, ["COUNT"]),
        ("oe", 40, {"bits_per_element": 2.51}, []),
        ("oe", 40, {"cache_bytes": 900, "bits_per_element": 2.2}, []),
    ],
)
def test_exact_checks(
    before: list[SampleRow], task: str, count: int, fields: dict[str, Any], expected: list[str]
) -> None:
    found = kinds(compared(changed(before, task, count, **fields), before))
    assert found == ({task: expected} if expected else {})


def test_a_worse_status_is_named(before: list[SampleRow], make_rows: MakeRows) -> None:
    now = make_rows("kivi", "oe", "!!" + "+" * 28 + "-" * 10, **STORED) + before[40:]
    (method,) = compared(now, before).methods
    (line,) = method.faults[Kind.STATUS]
    assert [fault.text for fault in line.faults] == [
        "ends in oom for 2 of 40 samples",
        "scores 38 samples instead of 40",
    ]
    assert line.counts.n == 38
    assert not compared(now, now).methods[0].faults
    better = kinds(compared(before, now))
    assert better == {"oe": ["COUNT"]}


def test_missing_cells_and_samples(before: list[SampleRow]) -> None:
    assert kinds(compared(before[:40], before)) == {"st": ["MISSING"]}
    assert kinds(compared(before[1:], before)) == {"oe": ["COUNT"]}
    assert kinds(compared(before, before[1:])) == {"oe": ["COUNT"]}
    (method,) = compared([], before).methods
    assert len(method.faults[Kind.MISSING]) == 2
    assert method.mean.now is None


def test_other_image_files_can_be_allowed(before: list[SampleRow]) -> None:
    now = changed(before, "oe", 3, images_sha256="other")
    result = compared(now, before, any_images=True)
    assert result.ok
    assert result.notes == ("image files with other bytes: 3 samples",)


def test_settings_and_new_cells_are_noted(before: list[SampleRow], make_rows: MakeRows) -> None:
    now = [dataclasses.replace(row, version="0.2.0", batch=8) for row in before]
    now += make_rows("rtn_int2", "oe", "+-")
    result = compared(now, before)
    assert result.ok
    assert result.notes == (
        "batch: 8; in the baseline 1",
        "version: 0.2.0; in the baseline 0.1.0",
        "not in the baseline: 1 cells, of rtn_int2",
    )


def test_a_sample_with_two_results_is_refused(before: list[SampleRow]) -> None:
    again = dataclasses.replace(before[0], key="again", version="0.2.0")
    with pytest.raises(UserError, match=r"sample 0 \(version 0\.1\.0 and 0\.2\.0\)"):
        compared([*before, again], before)


def test_kl_is_judged_where_it_is_asked_for(before: list[SampleRow]) -> None:
    """Accuracy is the same; KL doubles on 34 of 40 samples a task, halves on the others."""
    before = [dataclasses.replace(row, kl_mean=1e-3 * (row.sample_id + 1)) for row in before]
    now = [
        dataclasses.replace(row, kl_mean=(row.kl_mean or 0) * (4 if row.sample_id < 34 else 0.5))
        for row in before
    ]
    assert compared(now, before).ok
    assert kinds(compared(now, before, max_kl=2)) == {"mean": ["KL"]}
    (method,) = compared(now, before).methods
    assert method.mean.divergence is not None
    assert method.mean.divergence.ratio == pytest.approx(4 ** (34 / 40) * 0.5 ** (6 / 40))
    assert compared(now, before, max_kl=3).ok
    assert compared(before, now, max_kl=2).ok


def test_kl_that_grew_on_a_few_samples_is_chance(before: list[SampleRow]) -> None:
    before = [dataclasses.replace(row, kl_mean=1e-3) for row in before]
    now = changed(before, "oe", 5, kl_mean=1e9)
    (method,) = compared(now, before, max_kl=2).methods
    assert method.mean.divergence is not None
    assert method.mean.divergence.ratio > 2
    assert not method.faults
    assert kinds(compared(changed(before, "oe", 6, kl_mean=1e9), before, max_kl=2))


@pytest.mark.parametrize("limits", [{"max_drop": float("nan")}, {"max_kl": 0.5}, {"max_drop": -1}])
def test_limits_are_checked(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="--max-"):
        Limits(**limits)  # type: ignore[arg-type]


def test_the_mean_of_one_task_is_no_second_test(before: list[SampleRow]) -> None:
    """6 of 6 flips have p = 0.031: real for one test, chance for two."""
    now = changed(before, "oe", 6, correct=False)
    assert kinds(compared(now[:40], before[:40])) == {"mean": ["DROP"], "oe": ["DROP"]}
    assert compared(now, before).ok
