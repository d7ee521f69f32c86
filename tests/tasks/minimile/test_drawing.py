from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest

from kvbench.errors import UserError
from kvbench.tasks.minimile import FACT_VOCABULARY, FOLDERS, INSTRUCTIONS, draw, sample_rng

IMAGES = {
    "ObjectExistence": 6,
    "ObjectInteraction": 4,
    "MovingAttribute": 6,
    "EgocentricNavigation": 12,
    "StateChange": 4,
    "SceneTransition": 8,
    "nuscenes": 6,
    "WebQA": 4,
    "TQA": 4,
    "MultiModalQA": 4,
    "SlideVQA": 6,
    "DocVQA": 8,
}


@pytest.fixture(params=FOLDERS)
def drawings(request):
    folder = request.param
    return folder, [draw(folder, sample_rng("train", folder, 3, i)) for i in range(60)]


def test_the_twelve_folders_come_in_the_paper_order():
    assert tuple(IMAGES) == FOLDERS
    assert set(INSTRUCTIONS) == set(IMAGES)


def test_every_image_has_pixels_a_caption_and_facts_of_the_vocabulary(drawings):
    folder, drawn = drawings
    for drawing in drawn:
        assert drawing.folder == folder
        assert len(drawing.images) == len(drawing.captions) == len(drawing.facts) == IMAGES[folder]
        for image, caption, facts in zip(
            drawing.images, drawing.captions, drawing.facts, strict=True
        ):
            assert image.shape == (64, 64, 3)
            assert image.dtype == np.uint8
            assert caption and caption == caption.lower()
            assert facts
            assert all(value in FACT_VOCABULARY[key] for key, value in facts.items())


def test_placeholders_count_the_images_and_each_follows_its_marker(drawings):
    folder, drawn = drawings
    for drawing in drawn:
        *lines, question = drawing.context.split("\n")
        assert question.startswith("Question: ")
        assert question.endswith("?")
        for number, line in enumerate(lines, start=1):
            kind = "table" if folder == "MultiModalQA" and number == 1 else "image"
            assert re.fullmatch(rf"[A-Z][a-z ]*\d*: {{{kind}#{number}}}", line)
        assert len(lines) == len({line.split(":")[0] for line in lines}) == IMAGES[folder]


def test_options_survive_the_scorer(drawings):
    _, drawn = drawings
    for drawing in drawn:
        assert drawing.answer in drawing.choices
        assert len(drawing.choices) in (2, 4)
        for index, option in enumerate(drawing.choices):
            assert re.fullmatch(r"[a-z0-9]+( [a-z0-9]+)*", option)
            rest = drawing.choices[:index] + drawing.choices[index + 1 :]
            assert not any(option.replace(" ", "") in other.replace(" ", "") for other in rest)


def test_the_same_generator_state_gives_the_same_sample(drawings):
    folder, drawn = drawings
    again = draw(folder, Random(f"train/{folder}/3/0"))
    assert again.context == drawn[0].context
    assert again.choices == drawn[0].choices
    for first, second in zip(again.images, drawn[0].images, strict=True):
        np.testing.assert_array_equal(first, second)


def test_train_and_test_split_share_no_sample():
    for folder in FOLDERS:
        seen = {
            split: {
                b"".join(image.tobytes() for image in draw(folder, rng).images)
                for rng in (sample_rng(split, folder, 0, index) for index in range(40))
            }
            for split in ("train", "test")
        }
        assert len(seen["train"]) == len(seen["test"]) == 40
        assert not seen["train"] & seen["test"]


def test_an_unknown_folder_is_named_in_the_message():
    with pytest.raises(UserError, match="'OCR-VQA'"):
        draw("OCR-VQA", Random(0))
