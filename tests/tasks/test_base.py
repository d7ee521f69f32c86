from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from kvbench.tasks.base import Sample, Task, TaskData

CHOICE = Sample(4, "Do.", "{image#1}?", ("x", "y"), "y", (Path("/data/1.png"),), "Few")
OPEN = Sample(5, "Do.", "{image#1}?", None, "long", (Path("/data/2.png"),), "Few", "open-ended")


@pytest.mark.parametrize("sample", [CHOICE, OPEN])
def test_a_row_makes_the_same_sample(sample: Sample) -> None:
    assert Sample.from_row(sample.row() | {"more": 1}) == sample


def test_samples_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        CHOICE.truth = "x"


def test_a_dataset_keeps_image_paths_as_strings() -> None:
    dataset = TaskData((CHOICE, OPEN), "multi-choice").dataset()
    assert dataset.num_rows == 2
    assert dataset[0]["images"] == ["/data/1.png"]
    assert dataset["truth"][:] == ["y", "long"]
    assert [Sample.from_row(row) for row in dataset] == [CHOICE, OPEN]


def test_a_task_must_say_how_to_load_prompt_and_score() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Task("x", "X", "X", "X")
