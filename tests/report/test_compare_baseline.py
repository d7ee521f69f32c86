"""Baseline files: what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.report.regression import Limits, check, read_outcomes, save_baseline
from kvbench.report.regression.outcomes import outcome


@pytest.fixture
def saved(small_run: list[SampleRow], tmp_path: Path) -> Path:
    """A baseline file of the small run."""
    path = tmp_path / "small.jsonl.gz"
    save_baseline(map(outcome, small_run), path)
    return path


def rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    path.write_bytes(gzip.compress("\n".join(change(lines)).encode()))


def test_what_is_saved_is_read_again(saved: Path, small_run: list[SampleRow]) -> None:
    expected = {outcome(row) for row in small_run}
    assert set(read_outcomes(saved)) == expected
    assert len(read_outcomes(saved)) == len(small_run)


def test_the_order_of_rows_leaves_the_file_as_it_is(
    saved: Path, small_run: list[SampleRow], tmp_path: Path
) -> None:
    again = tmp_path / "again.jsonl.gz"
    save_baseline([outcome(row) for row in reversed(small_run)], again)
    assert again.read_bytes() == saved.read_bytes()


def test_a_run_folder_is_as_good_as_its_baseline(
    saved: Path, small_run: list[SampleRow], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    text = "".join(row.to_json() + "\n" for row in small_run)
    (folder / "samples.jsonl").write_text(text)
    result = check(read_outcomes(folder), read_outcomes(saved), Limits())
    assert result.ok
    assert result.notes == ()


def test_answers_that_never_read_the_cache_and_foreign_bytes_are_dropped(
    make_row: Callable[..., SampleRow],
) -> None:
    unread = outcome(make_row(packed_tokens_read=0))
    assert (unread.status, unread.correct) == ("ok", None)
    foreign = outcome(make_row(storage="foreign", packed_tokens_read=None, cache_bytes=5))
    assert (foreign.correct, foreign.cache_bytes) == (True, None)


def broken(field: str, value: Any) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[:-1], json.dumps({**json.loads(lines[-1]), field: value})]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (broken("schema", 2), "schema 1"),
        (lambda lines: [], "has no results"),
        (lambda lines: [*lines[:-1], lines[-1][:-5]], "line 18: a result row is no JSON"),
        (lambda lines: [*lines[:-1], "[1]"], "line 18: a result row is no JSON object"),
        (lambda lines: [*lines, lines[-1]], "two results of"),
        (broken("sample_id", True), "sample_id is True"),
        (broken("correct", 1), "correct is 1"),
        (broken("batch", 1.5), "batch is 1.5"),
        (broken("status", "fine"), "status is .fine., but must be one of"),
        (broken("more", 1), "lacks or adds more"),
    ],
)
def test_broken_files_are_refused(
    saved: Path, change: Callable[[list[str]], list[str]], part: str
) -> None:
    rewrite(saved, change)
    with pytest.raises(UserError, match=part):
        read_outcomes(saved)


@pytest.mark.parametrize(
    "content", [b"", b"not gzip", gzip.compress(b"x" * 999, mtime=0)[:-9], b"\x1f\x8b"]
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz"):
        read_outcomes(path)


def test_missing_places_and_wrong_names_are_refused(
    tmp_path: Path, small_run: list[SampleRow]
) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_outcomes(tmp_path / "none")
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        read_outcomes(tmp_path)
    with pytest.raises(UserError, match=r"end it in \.jsonl\.gz"):
        save_baseline(map(outcome, small_run), tmp_path / "x.json")
    fields = {field.name for field in dataclasses.fields(outcome(small_run[0]))}
    assert not fields & {"answer", "seconds", "key"}
