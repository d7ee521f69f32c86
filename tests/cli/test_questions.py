"""Questions for a run's page: read from the data, checked against the rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kvbench.cli.questions import read_questions
from kvbench.evaluation.rows import SampleRow
from kvbench.registry import TASKS
from kvbench.tasks import minimile
from kvbench.tasks.minimile import writer

FOLDER, TASK = "ObjectExistence", "oe"


def make_row(dataset: str, sample_id: int, task: str = TASK, **changes: Any) -> SampleRow:
    fields: dict[str, Any] = {
        "schema": 1, "key": "k", "model": "m", "revision": "", "dtype": "float32", "method": "fp16",
        "storage": "packed", "protocol": "exact_prefill", "dataset": dataset, "task": task,
        "task_version": 1, "sample_id": sample_id, "prompt_style": "", "prompt_sha256": "p",
        "images_sha256": "i", "generation": {}, "calibration": "", "batch": 1, "version": "0",
        "status": "ok", "error": None, "answer": "A", "extracted": "A", "correct": True,
        "strict": True, "empty": False, "unparsable": False, "images_kept": 1, "images_total": 1,
        "truncated": False, "prompt_tokens": 1, "generated_tokens": 1, "cache_bytes": None,
        "bits_per_element": None, "packed_tokens_read": None, "kl_first": None, "kl_mean": None,
        "agrees": None, "seconds": {},
    }  # fmt: skip
    return SampleRow(**(fields | changes))


def hash_of(paths: tuple[Path, ...]) -> str:
    parts = [path.read_bytes() for path in paths]
    return hashlib.sha256(b"".join(len(p).to_bytes(8, "big") + p for p in parts)).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    minimile.make(tmp_path / "data", seed=3, samples=3, folders=[FOLDER])
    return tmp_path / "data"


def test_questions_come_with_pictures_of_the_very_images(root: Path) -> None:
    samples = TASKS.get(TASK).load(root).samples
    rows = [
        make_row("minimile-1-seed3", 0, images_sha256=hash_of(samples[0].images)),
        make_row("minimile-1-seed3", 1, images_sha256="another"),
        make_row("minimile-1-seed3", 2, images_kept=0),
    ]
    found, remarks = read_questions(rows, root)
    assert (list(found), remarks) == ([("minimile-1-seed3", TASK)], [])
    same, other, cut = (found["minimile-1-seed3", TASK][place] for place in range(3))
    assert (same.context, same.truth) == (samples[0].context, samples[0].truth)
    assert same.sheet is not None and same.sheet.total == len(samples[0].images)
    assert same.remark == ""
    assert other.sheet is None and "not those of the run" in other.remark
    assert cut.sheet is not None and "left out of the prompt" in cut.remark


def test_only_samples_of_the_rows_are_read(root: Path) -> None:
    found, _ = read_questions([make_row("minimile-1-seed3", 2)], root)
    assert list(found["minimile-1-seed3", TASK]) == [2]


def test_a_broken_image_is_said(root: Path) -> None:
    sample = TASKS.get(TASK).load(root).samples[0]
    sample.images[0].write_bytes(b"no image")
    row = make_row("minimile-1-seed3", 0, images_sha256=hash_of(sample.images))
    question = read_questions([row], root)[0]["minimile-1-seed3", TASK][0]
    assert question.sheet is None and question.remark.startswith("No picture: ")


def test_minimile_of_any_seed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(writer, "SAMPLES", 2)
    minimile.make(tmp_path / "expected", seed=5, samples=2, folders=[FOLDER])
    found, remarks = read_questions([make_row("minimile-1-seed5", 1)], None)
    expected = TASKS.get(TASK).load(tmp_path / "expected").samples[1]
    assert not remarks
    assert found["minimile-1-seed5", TASK][1].context == expected.context


@pytest.mark.parametrize(
    ("dataset", "task", "reason"),
    [
        ("milebench", TASK, "name their folder with --data"),
        ("minimile-99-seed0", TASK, "is not what kvbench makes"),
        ("minimile-1-seed3", "no_such_task", "no_such_task"),
    ],
)
def test_what_cannot_be_had_is_said(
    dataset: str, task: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "SAMPLES", 1)
    monkeypatch.setattr(writer, "default_root", lambda: tmp_path)
    monkeypatch.setattr(minimile, "default_root", lambda: tmp_path)
    found, (remark,) = read_questions([make_row(dataset, 0, task=task)], None)
    assert not found and reason in remark


def test_data_of_another_set_are_not_taken(root: Path) -> None:
    manifest = root / writer.MANIFEST
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"seed": 4}))
    found, (remark,) = read_questions([make_row("milebench", 0)], root)
    assert not found and "--data" in remark


def test_no_picture_is_larger_than_its_share(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbench.report.html.thumbnails.BUDGET", 2_400)
    rows = [make_row("minimile-1-seed3", place, images_kept=0) for place in range(3)]
    for path in root.rglob("*.png"):
        Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    found, _ = read_questions(rows, root)
    sheets = [q.sheet for q in found["minimile-1-seed3", TASK].values()]
    assert all(sheet is None or len(sheet.content) <= 800 for sheet in sheets)
