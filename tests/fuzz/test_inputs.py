"""Mutated annotations and images: a well-formed sample or one sentence, nothing else and no hang.

KVBENCH_FUZZ says how many inputs are tried.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.tasks.base import IMAGE_MARKER, Sample
from kvbench.tasks.images import MAX_PIXELS, open_image
from kvbench.tasks.milebench import TASKS
from kvbench.tasks.milebench.check import TaskReport, check_task

INPUTS = int(os.environ.get("KVBENCH_FUZZ", "300"))
PARTS = 6
SECONDS = 10.0
TASK = TASKS["tqa"]
RECORD = re.compile(r"\bsample -?\d+\b|\bentry \d+ of data\b")
ANSWERS = ("", " \n", "B", "green", "A. red", "The answer is c", "?!" * 9, "\u0130\ud83d", "." * 40)


class Characters:
    """A tokenizer: one token a character."""

    def encode(self, text: str) -> list[int]:
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails when the block takes longer."""

    def late(*_: object) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: object, *names: str) -> str:
    """The text of an error, which must be one line of sensible length that holds all names."""
    text = str(error)
    assert "\n" not in text and len(text) < 1000, text[:2000]
    assert all(name in text for name in names), text
    return text


def entries(root: Path) -> list[Any]:
    """The raw entries, by the standard library alone."""
    path = root / TASK.folder / f"{TASK.folder}.json"
    found: list[Any] = json.loads(path.read_text(encoding="utf-8-sig"))["data"]
    return found


def check_sample(sample: Sample, raw: Any, root: Path, rng: random.Random) -> None:
    """A sample says what its entry says and can be asked and scored."""
    instance = raw["task_instance"]
    assert sample.sample_id == raw["sample_id"] and type(sample.sample_id) is int
    assert sample.context == instance["context"]
    assert sample.choices == tuple(instance["choice_list"]) and sample.choices
    assert sample.truth == str(raw["response"])
    assert len(sample.images) == len(instance["images_path"]) > 0
    inside = (root / TASK.folder / "images").resolve()
    assert all(path.is_file() and path.is_relative_to(inside.parent) for path in sample.images)
    prompt = TASK.prompt(sample, Characters(), rng.choice((200, 4096, 10**6)), 16)
    assert prompt.text.count(IMAGE_MARKER) == len(prompt.images) <= prompt.images_total
    for answer in (rng.choice(ANSWERS), sample.truth, instance["context"]):
        score = TASK.score(sample, answer)
        assert score.value in (0.0, 1.0) and score.correct == bool(score.value)


def check_images(sample: Sample) -> Iterator[Path]:
    """The images of a sample that are refused."""
    for path in sample.images:
        try:
            image = open_image(path)
        except UserError as error:
            sentence(error, str(path))
            yield path
        else:
            assert image.mode == "RGB" and 0 < image.width * image.height <= MAX_PIXELS


def check_report(report: TaskReport) -> None:
    """Every entry is counted once, and every fault has its sentence."""
    for problem in report.problems:
        sentence(problem, str(TASK.folder))
    assert len(report.images) + report.invalid == report.samples
    faults = report.invalid + report.truth_missing + report.missing + report.broken
    assert len(report.problems) == (faults if report.readable else 1)


def tried(root: Path, rng: random.Random) -> str:
    """What came of one input."""
    try:
        report = check_task(root, TASK)
    except UserError as error:  # the root itself
        raise AssertionError("a report doesn't raise") from error
    check_report(report)
    try:
        samples = TASK.load(root).samples
    except UserError as error:
        text = sentence(error, TASK.folder)
        assert text in report.problems
        if not report.readable:
            return "file refused"
        assert RECORD.search(text), text
        return "record refused"
    raw = entries(root)
    assert len(samples) == len(raw) == report.samples
    for sample, entry in zip(samples, raw, strict=True):
        check_sample(sample, entry, root, rng)
    refused = {path for sample in samples for path in check_images(sample)}
    assert report.broken == len(refused) == len(report.problems)
    return "image refused" if refused else "samples"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("part", range(PARTS))
def test_any_input_becomes_samples_or_a_sentence(
    broken: Callable[[int], Path], part: int, record_property: Callable[[str, object], None]
) -> None:
    found: Counter[str] = Counter()
    for seed in range(part, INPUTS, PARTS):
        root = broken(seed)
        try:
            with within(SECONDS):
                found[tried(root, random.Random(seed))] += 1
        except BaseException as error:
            error.add_note(f"data set number {seed}")
            raise
    assert sum(found.values()) == len(range(part, INPUTS, PARTS))
    assert set(found) >= {"samples", "record refused", "file refused", "image refused"}
    for kind, count in found.items():
        record_property(kind, count)
    print(dict(found))
