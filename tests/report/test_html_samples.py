"""Single samples: verdicts, what is shown of each, and contact sheets."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from kvbench.evaluation.rows import SampleRow
from kvbench.report.board import build
from kvbench.report.html.samples import (
    Question,
    answers,
    pictures_data,
    questions_data,
    verdict,
)
from kvbench.report.html.thumbnails import COLUMNS, GAP, MOST, Sheet, contact_sheet

MakeRows = Callable[..., list[SampleRow]]


def test_every_answer_is_found_again(small_run: list[SampleRow]) -> None:
    blocks = build(small_run).blocks
    groups = {group["task"]: group for group in answers(blocks, small_run)}
    oe = groups["oe"]
    assert oe["samples"] == [0, 1, 2, 3]
    assert oe["methods"] == [["fp16", "FP16"], ["kivi", "KIVI"], ["my_method", "my_method"]]
    shown = [
        ["-" if place < 0 else oe["outcomes"][place][0] for place in cells] for cells in oe["cells"]
    ]
    assert shown == [
        ["right", "right", "right", "wrong"],
        ["right", "wrong", "-", "-"],
        ["right", "out of memory", "out of memory", "out of memory"],
    ]
    assert oe["kl_mean"] == [[None] * 4, [0.5, 0.5, None, None], [None] * 4]
    json.dumps(groups)


def test_a_repeated_sample_is_shown_once_and_old_versions_not_at_all(make_rows: MakeRows) -> None:
    rows = [
        *make_rows("kivi", "oe", "!"),
        *make_rows("kivi", "oe", "+", batch=4),
        *make_rows("kivi", "oe", "-", task_version=0),
    ]
    (group,) = answers(build(rows).blocks, rows)
    assert [group["outcomes"][place][0] for place in group["cells"][0]] == ["right"]


def test_verdicts(make_row: Callable[..., SampleRow]) -> None:
    assert verdict(make_row()) == "right"
    assert verdict(make_row(right=False)) == "wrong"
    assert verdict(make_row(right=False, unparsable=True)) == "unparsable"
    assert verdict(make_row(right=False, empty=True, answer="")) == "empty"
    assert verdict(make_row(packed_tokens_read=0)) == "cache not read"
    assert verdict(make_row(method="fp16", packed_tokens_read=0)) == "right"
    assert verdict(make_row(status="oom")) == "out of memory"
    assert verdict(make_row(status="error")) == "error"
    assert verdict(make_row(), mixed=True) == "mixed"


def test_small_numbers_keep_their_digits(make_rows: MakeRows) -> None:
    rows = make_rows("kivi", "oe", "+", kl_first=0.000123456, kl_mean=12.3456)
    (group,) = answers(build(rows).blocks, rows)
    assert (group["kl_first"], group["kl_mean"]) == ([[0.000123]], [[12.3]])


def test_questions_share_their_instructions() -> None:
    sheet = Sheet(b"abc", 4, 2, 12, 20)
    found = {
        7: Question("Look.", "Is it?", ("no", "yes"), "no", sheet),
        3: Question("Look.", "What?", None, "a cat", remark="gone"),
    }
    assert questions_data(found) == {
        "instructions": ["Look."],
        "samples": {
            "3": [0, "What?", None, "a cat", "gone"],
            "7": [0, "Is it?", ("no", "yes"), "no", ""],
        },
    }
    assert pictures_data(found) == {"7": [base64.b64encode(b"abc").decode(), 4, 2, 12, 20]}


def photograph(seed: int) -> Image.Image:
    """Coarse noise made smooth: as hard to compress as a photograph."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("room", [60_000, 6_000, 2_500])
def test_sheets_fit_their_room(room: int) -> None:
    sheet = contact_sheet([photograph(seed) for seed in range(8)], 8, room)
    assert sheet is not None and len(sheet.content) <= room
    with Image.open(io.BytesIO(sheet.content)) as opened:
        assert (opened.format, opened.size) == ("WEBP", (sheet.width, sheet.height))


def test_more_room_makes_larger_sheets() -> None:
    images = [photograph(seed) for seed in range(MOST)]
    widths = [found.width for room in (6_000, 12_000, 100_000)
              if (found := contact_sheet(images, 30, room))]  # fmt: skip
    assert widths == sorted(set(widths)) and len(widths) == 3
    assert contact_sheet(images, 30, 50) is None
    assert contact_sheet([], 0, 10_000) is None


def test_drawings_keep_every_pixel_and_their_order() -> None:
    colors = [(10 * place, 0, 255 - 10 * place) for place in range(COLUMNS + 2)]
    images = [Image.new("RGB", (64, 48), color) for color in colors]
    sheet = contact_sheet(images, 9, 10_000)
    assert sheet is not None and (sheet.shown, sheet.total) == (COLUMNS + 2, 9)
    with Image.open(io.BytesIO(sheet.content)) as opened:
        pixels = opened.convert("RGB")
        for place, color in enumerate(colors):
            row, column = divmod(place, COLUMNS)
            at = (column * (64 + GAP) + 32, row * (48 + GAP) + 24)
            assert pixels.getpixel(at) == color
