"""Rows: what follows from a try, what a key covers, and the way through a file."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.efficiency.request import TrialResult
from kvbench.efficiency.rows import (
    ROW_KIND,
    SCHEMA,
    TRY_KIND,
    EfficiencyRow,
    Setting,
    TryRow,
    latest,
    make_row,
    read_efficiency,
)
from kvbench.errors import UserError
from kvbench.evaluation.lines import Lines
from tests.efficiency.made_up import SETTING

SHORT = dataclasses.replace(SETTING, method="akvq_vl", label="AKVQ-VL", output_tokens=5)
RESULT = TrialResult(
    "ok",
    peak_nvml=60 << 30,
    tpot_s=(0.02, 0.03, 0.01, 0.04),
    prompts_s=(1.5, 0.5),
    ttft_s=2.0,
    decode_s=0.1,
    total_s=2.1,
    bytes_per_step=30e9,
    flops_per_step=2 * 6e9 * 100,
    copy_bandwidth=3e12,
    matmul_rate=400e12,
)
OTHER: dict[str, Any] = {
    "model": "m", "model_label": "m", "revision": "r", "method": "fp16", "label": "FP16",
    "runner": "generate", "protocol": "quantized_prefill", "dtype": "bfloat16", "input_tokens": 9,
    "vision_tokens": 0, "output_tokens": 3, "fixed_batch": 4, "prefill_rows": 2, "seed": 1,
    "gpu": "h100", "gpu_label": "H100", "memory": "measured", "memory_limit": None, "device": "x",
    "code": "d", "versions": {"torch": "2.13"},
}  # fmt: skip


def row(setting: Setting = SHORT, result: TrialResult = RESULT, **changes: Any) -> EfficiencyRow:
    given = {"batch": 100, "out_of_memory_at": 101, "tries": 5, "machine": "Linux",
             "command": "kvbench efficiency", "time": "2025-01-01T00:00:00+00:00"}  # fmt: skip
    return make_row(setting, result, **{**given, **changes})


def test_what_follows_from_a_try() -> None:
    made = row()
    assert made.throughput == pytest.approx(100 * 5 / 2.1)
    assert made.decode_throughput == pytest.approx(100 * 4 / 0.1)
    assert made.tpot_median_s == pytest.approx(0.025)
    assert made.tpot_p95_s == pytest.approx(np.quantile([0.02, 0.03, 0.01, 0.04], 0.95))
    assert made.achieved_bandwidth == pytest.approx(30e9 / 0.025)
    assert made.bandwidth_share == pytest.approx(30e9 / 0.025 / 3e12)
    # 12 GB of weights in 4 ms, 1.2 TFLOP in 3 ms, 18 GB of cache in 6 ms.
    assert made.floor_s == pytest.approx(4e-3 + 6e-3)
    assert made.over_floor == pytest.approx(2.5)
    assert made.searched


def test_where_products_take_longer_than_weights() -> None:
    slow = dataclasses.replace(RESULT, matmul_rate=100e12)
    assert row(result=slow).floor_s == pytest.approx(12e-3 + 6e-3)


def test_what_was_not_measured_stays_open() -> None:
    made = row(result=TrialResult("oom", "no room"), batch=0)
    for name in ("throughput", "decode_throughput", "tpot_median_s", "tpot_p95_s", "floor_s",
                 "achieved_bandwidth", "bandwidth_share", "over_floor"):  # fmt: skip
        assert getattr(made, name) is None
    assert row(result=dataclasses.replace(RESULT, tpot_s=(0.5,))).tpot_p95_s == 0.5


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Setting)])
def test_everything_is_in_the_key(name: str) -> None:
    changed = dataclasses.replace(SHORT, **{name: OTHER[name]})
    assert changed.row_key() != SHORT.row_key() == dataclasses.replace(SHORT).row_key()


def test_rows_survive_a_file(tmp_path: Path) -> None:
    first, second = row(), row(dataclasses.replace(SHORT, method="fp16"), batch=30)
    with Lines(tmp_path, ROW_KIND) as lines:
        assert lines.append(first) and lines.append(second)
    assert read_efficiency(tmp_path) == [first, second]
    with Lines(tmp_path, ROW_KIND) as lines:
        assert lines.get(first.key) == first
        assert not lines.append(first)


def test_failures_are_tried_again_and_limits_are_not(tmp_path: Path) -> None:
    for status, final in (("failed", False), ("timeout", False), ("oom", True)):
        folder = tmp_path / status
        with Lines(folder, ROW_KIND) as lines:
            lines.append(row(result=TrialResult(status)))  # type: ignore[arg-type]
        with Lines(folder, ROW_KIND) as lines:
            assert lines.has(row().key) is final


def test_the_newest_row_takes_the_place_of_older_code() -> None:
    old = row(time="2025-01-01T00:00:00+00:00")
    other = row(dataclasses.replace(SHORT, fixed_batch=40), batch=40)
    new = row(dataclasses.replace(SHORT, code="new", versions={}), time="2025-01-02T00:00:00")
    assert latest([old, other, new]) == [new, other]
    assert latest([new, other, old]) == [new, other]


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch", "3"), ("throughput", math.nan), ("status", "fine"), ("memory", "guessed"),
     ("tpot_s", [0.1]), ("versions", None), ("peak_nvml", 1.5)],
)  # fmt: skip
def test_impossible_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError, match=name):
        dataclasses.replace(row(), **{name: value})


def test_rows_of_the_first_schema_are_read(tmp_path: Path) -> None:
    file = tmp_path / ROW_KIND.name
    old = json.loads(row().to_json()) | {"schema": 1, "ttft_first_s": 1.5, "prefill_s": 2.0}
    del old["prompts_s"]
    file.write_text(json.dumps(old) + "\n")
    assert read_efficiency(tmp_path) == [dataclasses.replace(row(), prompts_s=())]
    file.write_text(json.dumps(old | {"schema": 0}) + "\n")
    with pytest.raises(UserError, match="schema 0"):
        read_efficiency(tmp_path)


def test_tries_survive_a_file(tmp_path: Path) -> None:
    one = TryRow(**vars(RESULT), schema=SCHEMA, key="k", request={"batch": 3}, seconds=1.5)
    with Lines(tmp_path, TRY_KIND) as lines:
        lines.append(one)
    assert TRY_KIND.read(tmp_path / "tries.jsonl") == [one]
