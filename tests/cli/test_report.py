"""``kvbench report --html``: the whole way from rows to a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.evaluation.rows import SampleRow
from kvbench.tasks import minimile


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Rows of one minimile sample under two methods."""
    fields: dict[str, Any] = {
        "schema": 1, "key": "k", "model": "m", "revision": "", "dtype": "float32",
        "storage": "packed", "protocol": "exact_prefill", "dataset": "minimile-1-seed3",
        "task": "oe", "task_version": 1, "sample_id": 0, "prompt_style": "", "prompt_sha256": "p",
        "images_sha256": "i", "generation": {}, "calibration": "", "batch": 1, "version": "0",
        "status": "ok", "error": None, "answer": "A", "extracted": "A", "correct": True,
        "strict": True, "empty": False, "unparsable": False, "images_kept": 0, "images_total": 6,
        "truncated": True, "prompt_tokens": 1, "generated_tokens": 1, "cache_bytes": 5,
        "bits_per_element": 2.0, "packed_tokens_read": 7, "kl_first": None, "kl_mean": None,
        "agrees": None, "seconds": {},
    }  # fmt: skip
    rows = [SampleRow(**fields, method=method) for method in ("fp16", "kivi")]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    return folder


def test_the_page_has_questions_and_pictures(
    run_folder: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    data, out = tmp_path / "data", tmp_path / "page.html"
    minimile.make(data, seed=3, samples=1, folders=["ObjectExistence"])
    result = invoke("report", run_folder, "--html", out, "--data", data)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == str(out)
    text = out.read_text(encoding="utf-8")
    assert "in any image?" in text
    assert 'data-pictures="minimile-1-seed3/oe">{"0":["' in text


def test_data_that_are_not_there(
    run_folder: Path, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    result = invoke("report", run_folder, "--html", tmp_path / "x.html", "--data", "/nowhere")
    assert (result.exit_code, "--data" in result.output) == (2, True)


def test_without_the_option_there_is_no_page(
    run_folder: Path, invoke: Callable[..., Result]
) -> None:
    assert invoke("report", run_folder).exit_code == 0
    assert not list(run_folder.glob("*.html"))
