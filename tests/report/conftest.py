"""Result rows of small made-up runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from kvbench.evaluation.rows import SampleRow

BY_TYPE: dict[str, Any] = {"str": "x", "int": 1, "bool": False, "dict[str, Any]": {}}
BY_TYPE["dict[str, float]"] = {}
DEFAULTS: dict[str, Any] = {
    **{field.name: BY_TYPE.get(str(field.type)) for field in dataclasses.fields(SampleRow)},
    "model": "tiny",
    "revision": "r1",
    "dtype": "float32",
    "method": "rtn_int2",
    "storage": "packed",
    "protocol": "quantized_prefill",
    "dataset": "toys",
    "task": "oe",
    "prompt_style": "chatml",
    "generation": {"max_new_tokens": 8},
    "calibration": "",
    "version": "0.1.0",
    "status": "ok",
}


def build_row(*, right: bool = True, **changes: Any) -> SampleRow:
    """One row; ``right`` sets answer and verdict, a status other than ok takes them away."""
    fields = {**DEFAULTS, **changes}
    if fields["status"] == "ok":
        verdict = {"answer": "A" if right else "B", "extracted": "A", "correct": right}
        verdict |= {"strict": right, "empty": False, "unparsable": False}
        fields = {**DEFAULTS, **verdict, "packed_tokens_read": 100, **changes}
    else:
        fields["error"] = "it failed"
    # Unlike a real key, this one shows in a failing test what the row is.
    parts = ("model", "protocol", "method", "task", "sample_id", "batch", "version", "status")
    fields.setdefault("key", "")
    fields["key"] = changes.get("key", "/".join(str(fields[part]) for part in parts))
    return SampleRow(**fields)


@pytest.fixture
def make_row() -> Callable[..., SampleRow]:
    """Make one row, each field settable; ``right`` sets the verdict."""
    return build_row


@pytest.fixture
def make_rows() -> Callable[..., list[SampleRow]]:
    """Make the rows of one method and task from a text: + right, - wrong, ! out of memory."""

    def make(method: str, task: str, outcomes: str, **changes: Any) -> list[SampleRow]:
        if method == "fp16":
            changes = {"packed_tokens_read": 0, **changes}
        return [
            build_row(
                method=method,
                task=task,
                sample_id=sample,
                right=outcome == "+",
                status="oom" if outcome == "!" else "ok",
                **changes,
            )
            for sample, outcome in enumerate(outcomes)
        ]

    return make


@pytest.fixture
def small_run(make_rows: Callable[..., list[SampleRow]]) -> list[SampleRow]:
    """Three methods on two tasks of four samples; kivi isn't through yet."""
    return [
        *make_rows("kivi", "oe", "+-", bits_per_element=2.5, cache_bytes=1000, kl_mean=0.5),
        *make_rows("fp16", "st", "+-++", bits_per_element=16.0, cache_bytes=8000),
        *make_rows("fp16", "oe", "+++-", bits_per_element=16.0, cache_bytes=9000),
        *make_rows("my_method", "st", "--+-", storage="simulated", bits_per_element=3.0),
        *make_rows("my_method", "oe", "+!!!", storage="simulated", bits_per_element=3.0),
    ]
