"""A data root in MileBench's layout, small enough to be written for every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDERS = (
    "ObjectExistence",
    "ObjectInteraction",
    "MovingAttribute",
    "EgocentricNavigation",
    "StateChange",
    "SceneTransition",
    "nuscenes",
    "WebQA",
    "TQA",
    "MultiModalQA",
    "SlideVQA",
    "DocVQA",
)


def entry(sample_id: int, images: int = 2) -> dict[str, Any]:
    """One multiple-choice entry with `images` placeholders; the truth is option B."""
    places = "".join(f"{{image#{k}}}" for k in range(1, images + 1))
    return {
        "sample_id": sample_id,
        "task_instruction_id": 0,
        "image_quantity_level": "Few",
        "task_instance": {
            "context": f"{places}Which colour does image {sample_id} show?",
            "images_path": [f"{sample_id}_{k}.png" for k in range(images)],
            "choice_list": ["red", "green", "blue"],
        },
        "response": "green",
    }


def content(samples: int = 2, question_type: str = "multi-choice") -> dict[str, Any]:
    """A whole annotation file."""
    return {
        "meta_data": {
            "question_type": question_type,
            "task_instruction": ["Look and choose.", "Choose."],
            "num_sample": samples,
        },
        "data": [entry(index) for index in range(samples)],
    }


Edit = Callable[[dict[str, Any]], object]
MakeTask = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def make_task(root: Path) -> MakeTask:
    """Writes one task's folder and returns the data root.

    `edit` changes the annotation before it is written; images are made for the unedited one.
    """

    def make(folder: str = "TQA", samples: int = 2, edit: Edit | None = None) -> Path:
        annotation = content(samples)
        images = root / folder / "images"
        images.mkdir(parents=True)
        for item in annotation["data"]:
            for index, name in enumerate(item["task_instance"]["images_path"]):
                colour = (80 * item["sample_id"] % 256, 200 * index, 30)
                Image.new("RGB", (8, 6), colour).save(images / name)
        if edit is not None:
            edit(annotation)
        (root / folder / f"{folder}.json").write_text(json.dumps(annotation), encoding="utf-8")
        return root

    return make


@pytest.fixture
def full_root(make_task: MakeTask, root: Path) -> Path:
    """All twelve tasks, two samples each."""
    for folder in FOLDERS:
        make_task(folder)
    return root
