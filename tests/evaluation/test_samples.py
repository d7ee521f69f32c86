"""Samples, prompts and images as an evaluation takes them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.samples import Question, ask, encoded, read_cell
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.tasks.minimile import VERSION


@pytest.fixture(scope="module")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_llava_folder}"))


@pytest.fixture
def copied(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "data")
    return tmp_path / "data"


def first(loaded: LoadedModel, root: Path) -> Question:
    cell = read_cell("oe", root, None, 0)
    return ask(loaded, cell.task, cell.samples[0])


def test_a_limit_takes_the_same_samples_whatever_else_is_asked(drawn: Path) -> None:
    expected = sorted(random.Random("7/oe").sample(range(6), 4))
    cell = read_cell("oe", drawn, 4, 7)
    assert [sample.sample_id for sample in cell.samples] == expected
    assert len({tuple(read_cell("oe", drawn, 3, seed).samples) for seed in range(5)}) > 1
    assert len(read_cell("oe", drawn, None, 7).samples) == 6
    assert len(read_cell("oe", drawn, 6, 7).samples) == 6


def test_data_sets_are_named(drawn: Path, copied: Path) -> None:
    assert read_cell("oe", drawn, None, 0).dataset == f"minimile-{VERSION}-seed0"
    (copied / "minimile.json").unlink()
    assert read_cell("oe", copied, None, 0).dataset == "milebench"


def test_a_prompt_is_known_by_its_text_and_pixels(loaded: LoadedModel, copied: Path) -> None:
    question = first(loaded, copied)
    rendered = loaded.style.render(question.text)
    assert question.prompt_sha256 == hashlib.sha256(rendered.encode()).hexdigest()
    assert first(loaded, copied) == question

    annotation = copied / "ObjectExistence" / "ObjectExistence.json"
    content = json.loads(annotation.read_text())
    content["data"][0]["task_instance"]["context"] += " Really?"
    annotation.write_text(json.dumps(content))
    reworded = first(loaded, copied)
    assert reworded.prompt_sha256 != question.prompt_sha256
    assert reworded.images_sha256 == question.images_sha256

    with question.prompt.images[2].open("ab") as file:
        file.write(b"\0")
    repainted = first(loaded, copied)
    assert repainted.prompt_sha256 == reworded.prompt_sha256
    assert repainted.images_sha256 != question.images_sha256


def test_where_one_image_ends_belongs_to_the_hash(loaded: LoadedModel, copied: Path) -> None:
    one, two, *_ = first(loaded, copied).prompt.images
    content = one.read_bytes() + two.read_bytes()
    found = set()
    for cut in (100, 101):
        one.write_bytes(content[:cut])
        two.write_bytes(content[cut:])
        found.add(first(loaded, copied).images_sha256)
    assert len(found) == 2


def test_images_are_refused_before_they_fill_the_memory(loaded: LoadedModel, copied: Path) -> None:
    image = first(loaded, copied).prompt.images[0]
    os.truncate(image, 2**40)  # a hole: takes no disk
    with pytest.raises(UserError, match="too large for an image"):
        first(loaded, copied)


def test_images_that_vanish_are_named(loaded: LoadedModel, copied: Path) -> None:
    cell = read_cell("oe", copied, None, 0)
    image = cell.samples[0].images[0]
    image.unlink()
    with pytest.raises(UserError, match=f"{image.name}: the image is missing"):
        ask(loaded, cell.task, cell.samples[0])


def test_a_batch_is_padded_on_the_left(loaded: LoadedModel, drawn: Path) -> None:
    cells = [read_cell(name, drawn, None, 0) for name in ("oe", "wqa")]
    questions = [ask(loaded, cell.task, cell.samples[0]) for cell in cells]
    inputs = encoded(loaded, questions)
    lengths = [encoded(loaded, [question]).prompt_tokens[0] for question in questions]
    assert inputs.prompt_tokens == tuple(lengths)
    assert inputs.attention_mask.sum(1).tolist() == lengths
    assert inputs.input_ids.shape == (2, max(lengths))
    assert inputs.attention_mask[:, -1].tolist() == [1, 1]
    images = [len(question.prompt.images) for question in questions]
    assert inputs.is_vision.sum(1).tolist() == [16 * count for count in images]
    assert inputs.images["pixel_values"].shape[0] == sum(images)


def test_a_broken_image_names_the_file(loaded: LoadedModel, copied: Path) -> None:
    question = first(loaded, copied)
    image = question.prompt.images[1]
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(UserError, match=f"{image.name}: the image is damaged"):
        encoded(loaded, [question])
