"""Rows of results, each field settable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvbench.evaluation.rows import SampleRow

FIELDS: dict[str, Any] = {
    "schema": 1,
    "key": "k0",
    "model": "tiny",
    "revision": "r1",
    "dtype": "float32",
    "method": "rtn_int2",
    "storage": "packed",
    "protocol": "quantized_prefill",
    "dataset": "minimile-1-seed0",
    "task": "oe",
    "task_version": 1,
    "sample_id": 0,
    "prompt_style": "chatml",
    "prompt_sha256": "p0",
    "images_sha256": "i0",
    "generation": {"max_new_tokens": 16, "do_sample": False},
    "calibration": "",
    "batch": 1,
    "version": "0.1.0",
    "status": "ok",
    "error": None,
    "answer": "B. red circle",
    "extracted": "B",
    "correct": True,
    "strict": True,
    "empty": False,
    "unparsable": False,
    "images_kept": 4,
    "images_total": 4,
    "truncated": False,
    "prompt_tokens": 300,
    "generated_tokens": 5,
    "cache_bytes": 1000,
    "bits_per_element": 2.5,
    "packed_tokens_read": 1500,
    "kl_first": 0.25,
    "kl_mean": 0.5,
    "agrees": True,
    "seconds": {"total": 0.5},
}
FAILED: dict[str, Any] = {
    "error": "out of memory",
    **dict.fromkeys(("answer", "extracted", "correct", "strict", "empty", "unparsable")),
}


@pytest.fixture
def fields() -> dict[str, Any]:
    """The fields of a valid row."""
    return dict(FIELDS)


@pytest.fixture
def make_row() -> Callable[..., SampleRow]:
    """Make a row; a status other than ok takes the answer away."""

    def make(**changes: Any) -> SampleRow:
        failed = FAILED if changes.get("status", "ok") != "ok" else {}
        return SampleRow(**{**FIELDS, **failed, **changes})

    return make
