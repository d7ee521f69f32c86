from __future__ import annotations

import json
import re
from collections import Counter
from importlib.machinery import ModuleSpec
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvbench.errors import UserError
from kvbench.tasks.easy_vqa import FOLDER, draw, make, source
from kvbench.tasks.milebench import TASKS
from kvbench.tasks.minimile import FACT_VOCABULARY, sample_rng

COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}


def draw_many(split, count):
    return [draw(sample_rng(split, FOLDER, 0, index), split) for index in range(count)]


@pytest.fixture(scope="module")
def train():
    return draw_many("train", 1500)


@pytest.fixture
def fresh():
    """No split or image in memory, before and after."""
    for cached in (source.load, source.image):
        cached.cache_clear()
    yield
    for cached in (source.load, source.image):
        cached.cache_clear()


def parts(drawing):
    """The number of the image asked about, the question, its images' facts."""
    number, question = re.search(r"Question: In image (\d), (.*)\?$", drawing.context).groups()
    return int(number), question, drawing.facts[int(number) - 1]


def test_six_different_images_and_a_question_about_one(train):
    for drawing in train:
        assert len(drawing.images) == len(drawing.captions) == len(drawing.facts) == 6
        assert len({image.tobytes() for image in drawing.images}) == 6
        assert all(image.shape == (64, 64, 3) for image in drawing.images)
        assert drawing.context.startswith("Image 1: {image#1}\nImage 2: {image#2}\n")
    assert {parts(drawing)[0] for drawing in train} == {1, 2, 3, 4, 5, 6}


def test_options_are_of_the_kind_that_is_asked_for(train):
    for drawing in train:
        choices = set(drawing.choices)
        assert drawing.answer in choices
        assert len(choices) == len(drawing.choices)
        assert choices in ({"yes", "no"}, SHAPES) or (len(choices) == 4 and choices <= COLORS)


def test_facts_are_of_the_vocabulary_and_give_the_answer(train):
    for drawing in train:
        assert all(v in FACT_VOCABULARY[k] for facts in drawing.facts for k, v in facts.items())
        _, question, facts = parts(drawing)
        if drawing.answer in COLORS:
            assert facts["color"] == drawing.answer
        elif drawing.answer in SHAPES:
            assert facts["shape"] == drawing.answer
        else:
            (named,) = set(question.split()) & (COLORS | SHAPES)
            known = facts.get("color" if named in COLORS else "shape")
            negated = bool({"not", "no"} & set(question.split()))
            assert (drawing.answer == "yes") != ((known == named) == negated)


def test_facts_agree_with_the_pixels(train):
    """The color that fills most of what is not white, judged by hue alone."""
    rgb = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
    checked = 0
    for drawing in train[:200]:
        for image, facts in zip(drawing.images, drawing.facts, strict=True):
            if facts.get("color") in rgb:
                pixels = image.reshape(-1, 3).astype(int)
                corner = np.abs(pixels - pixels[0]).sum(-1)
                inside = pixels[corner > 60]
                distances = {
                    name: np.abs(np.median(inside, 0) - color).sum() for name, color in rgb.items()
                }
                assert min(distances, key=distances.get) == facts["color"]
                checked += 1
    assert checked > 300


def test_yes_and_no_are_balanced_whatever_the_question_says(train):
    answers = Counter()
    for drawing in train:
        if drawing.answer in ("yes", "no"):
            words = set(parts(drawing)[1].split())
            answers[bool({"not", "no"} & words), bool(words & COLORS), drawing.answer] += 1
    assert len(answers) == 8
    for negated in (False, True):
        for colored in (False, True):
            yes, no = (answers[negated, colored, answer] for answer in ("yes", "no"))
            assert abs(yes - no) < 4 * sqrt(yes + no)


def test_kinds_of_questions_have_their_shares(train):
    kinds = Counter(
        "yes-no" if d.answer in ("yes", "no") else "color" if d.answer in COLORS else "shape"
        for d in train
    )
    for kind, share in {"yes-no": 0.5, "color": 0.25, "shape": 0.25}.items():
        assert abs(kinds[kind] / 1500 - share) < 4 * sqrt(share * (1 - share) / 1500)


def test_splits_have_their_own_images():
    images = {
        split: {i.tobytes() for d in draw_many(split, 150) for i in d.images}
        for split in ("train", "test")
    }
    folder = source.load("test").folder
    assert len(list(folder.glob("*.png"))) == 1000
    shared = len(images["train"] & images["test"]) / len(images["test"])
    assert shared < 0.02  # the wheel itself may repeat a picture
    with pytest.raises(UserError, match="'validation'"):
        draw(sample_rng("test", FOLDER, 0, 0), "validation")


def test_drawing_is_repeatable():
    first, second = (draw(sample_rng("test", FOLDER, 0, 7), "test") for _ in range(2))
    assert (first.context, first.choices, first.answer) == (
        second.context,
        second.choices,
        second.answer,
    )
    assert all((a == b).all() for a, b in zip(first.images, second.images, strict=True))


def test_written_in_milebench_layout(tmp_path):
    make(tmp_path / "set", samples=5, seed=2)
    task = TASKS["easy_vqa"]
    samples = task.load(tmp_path / "set").samples
    assert len(samples) == 5
    for index, sample in enumerate(samples):
        drawing = draw(sample_rng("test", FOLDER, 2, index), "test")
        assert (sample.context, sample.truth) == (drawing.context, drawing.answer)
        assert sample.choices == drawing.choices
        assert task.score(sample, sample.truth).correct
        with Image.open(sample.images[3]) as image:
            np.testing.assert_array_equal(np.array(image), drawing.images[3])
    manifest = json.loads((tmp_path / "set" / "easy_vqa.json").read_text())
    assert (manifest["seed"], manifest["samples"]) == (2, 5)
    with pytest.raises(UserError, match="0 samples"):
        make(tmp_path / "none", samples=0)


def test_a_missing_wheel_is_named_with_the_cure(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(source, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps easy-vqa"):
        draw(sample_rng("test", FOLDER, 0, 0), "test")
    with pytest.raises(UserError, match="pip install --no-deps easy-vqa"):
        make(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def place_wheel(monkeypatch, folder: Path, questions: str):
    """Pretend that the wheel lies in a folder."""
    images = folder / "data" / "test" / "images"
    images.mkdir(parents=True)
    (folder / "data" / "test" / "questions.json").write_text(questions)
    spec = ModuleSpec("easy_vqa", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(source, "find_spec", lambda name: spec)
    return images


@pytest.mark.parametrize("questions", ["", "[[1, 2]]", "[3]", '{"a": 1}'])
def test_broken_questions_are_named(fresh, monkeypatch, tmp_path, questions):
    place_wheel(monkeypatch, tmp_path, questions)
    with pytest.raises(UserError, match=r"questions\.json"):
        source.load("test")


def test_missing_truncated_and_resized_images_are_named(fresh, monkeypatch, tmp_path):
    images = place_wheel(monkeypatch, tmp_path, '[["is there a circle?", "yes", 0]]')
    with pytest.raises(UserError, match=r"0\.png"):
        source.image("test", 0)
    (images / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match=r"1\.png"):
        source.image("test", 1)
    Image.new("RGB", (32, 64)).save(images / "2.png")
    with pytest.raises(UserError, match="not 64 x 64"):
        source.image("test", 2)


@pytest.mark.parametrize(
    ("text", "answer", "facts"),
    [
        ("what is the blue shape?", "rectangle", {"color": "blue", "shape": "rectangle"}),
        ("what color is the shape?", "teal", {"color": "teal"}),
        ("is there a triangle?", "yes", {"shape": "triangle"}),
        ("is there a triangle?", "no", {}),
        ("does the image not contain a gray shape?", "no", {"color": "gray"}),
        ("does the image not contain a gray shape?", "yes", {}),
        ("is no circle present?", "no", {"shape": "circle"}),
    ],
)
def test_what_a_question_tells_about_its_image(fresh, monkeypatch, tmp_path, text, answer, facts):
    place_wheel(monkeypatch, tmp_path, json.dumps([[text, answer, 4]]))
    assert source.load("test").facts == {4: facts}
