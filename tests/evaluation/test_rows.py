"""Rows refuse what can't be a result, and keys change with all that could change an answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow, row_key

KEY_FIELDS = (
    "model", "revision", "dtype", "method", "protocol", "dataset", "task", "task_version",
    "sample_id", "prompt_style", "prompt_sha256", "images_sha256", "generation", "calibration",
    "batch", "version",
)  # fmt: skip


def key_of(fields: dict[str, Any], **changes: Any) -> str:
    return row_key(**{name: fields[name] for name in KEY_FIELDS} | changes)


def test_a_row_survives_json(make_row: Callable[..., SampleRow]) -> None:
    row = make_row(answer='two\nlines, "quotes" and 漢字 \ud83d', error=None)
    line = row.to_json()
    assert "\n" not in line
    assert SampleRow.from_json(line) == row
    failed = make_row(status="oom", kl_mean=None)
    assert SampleRow.from_json(failed.to_json()) == failed


def test_json_has_every_field_by_name(fields: dict[str, Any]) -> None:
    assert json.loads(SampleRow(**fields).to_json()) == fields


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", 2),
        ("sample_id", "0"),
        ("sample_id", True),
        ("correct", 1),
        ("answer", 3),
        ("answer", None),
        ("storage", "zipped"),
        ("protocol", "streaming"),
        ("status", "fine"),
        ("status", "oom"),
        ("error", "but it has an answer"),
        ("batch", 0),
        ("kl_mean", math.nan),
        ("bits_per_element", math.inf),
        ("cache_bytes", 10.5),
        ("seconds", {"total": "fast"}),
        ("seconds", {"total": math.nan}),
        ("generation", ["greedy"]),
    ],
)
def test_impossible_values_are_refused(fields: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        SampleRow(**fields | {name: value})


def test_a_failed_row_needs_a_reason(make_row: Callable[..., SampleRow]) -> None:
    with pytest.raises(UserError, match="status error"):
        make_row(status="error", error=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("answer"), "answer"),
        (lambda data: data.update(colour="red"), "colour"),
        (lambda data: data.update(schema=99), "schema 99"),
        (lambda data: data.pop("schema"), "schema None"),
    ],
)
def test_json_of_another_layout_is_refused(
    fields: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    change(fields)
    with pytest.raises(UserError, match=message):
        SampleRow.from_json(json.dumps(fields))


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "null"])
def test_what_is_no_object_is_refused(line: str) -> None:
    with pytest.raises(UserError, match="JSON"):
        SampleRow.from_json(line)


@pytest.mark.parametrize("name", KEY_FIELDS)
def test_the_key_changes_with_every_part(fields: dict[str, Any], name: str) -> None:
    old = fields[name]
    new = {"text": f"{old}x", "number": 7, "settings": {**FIELD_SETTINGS, "max_new_tokens": 17}}
    kind = "settings" if isinstance(old, dict) else "number" if isinstance(old, int) else "text"
    assert key_of(fields, **{name: new[kind]}) != key_of(fields)


FIELD_SETTINGS = {"max_new_tokens": 16, "do_sample": False}


def test_the_key_is_the_hash_of_canonical_json(fields: dict[str, Any]) -> None:
    text = (
        '{"batch":1,"calibration":"","dataset":"minimile-1-seed0","dtype":"float32",'
        '"generation":{"do_sample":false,"max_new_tokens":16},"images_sha256":"i0",'
        '"method":"rtn_int2","model":"tiny","prompt_sha256":"p0","prompt_style":"chatml",'
        '"protocol":"quantized_prefill","revision":"r1","sample_id":0,"schema":1,"task":"oe",'
        '"task_version":1,"version":"0.1.0"}'
    )
    assert key_of(fields) == hashlib.sha256(text.encode()).hexdigest()


def test_the_order_of_settings_does_not_matter(fields: dict[str, Any]) -> None:
    turned = dict(reversed(FIELD_SETTINGS.items()))
    assert key_of(fields, generation=turned) == key_of(fields)
