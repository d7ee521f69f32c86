"""What the YAML files point at: lm-eval's view of MileBench's reader, prompt and scorer.

lm-eval gives documents no context budget and no tokenizer, so prompts here are not truncated and
carry no chat template. A model class that can do better rebuilds the sample from the document
with `Sample.from_row`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.tasks.base import IMAGE_MARKER, Prompt, Sample
from kvbench.tasks.images import open_image
from kvbench.tasks.milebench.catalog import TASKS
from kvbench.tasks.milebench.prompt import newline_rule

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

MODEL_MARKER = "<image>"
"""lm-eval's own marker for an image in a text."""

_UNLIMITED = 2**62


class _Characters:
    """A lossless tokenizer for prompts that nothing is cut from."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def custom_dataset(
    task: str, data_root: str | None = None, image_paths: bool = False, **_: Any
) -> dict[str, datasets.Dataset]:
    """A task's documents as the split "test".

    The arguments come from the task's metadata, so `--metadata` can set them.

    Args:
        task: short name, as "oe".
        data_root: the data root; by default the environment variable KVBENCH_DATA.
        image_paths: hand images to the model as path strings instead of opened.

    Raises:
        UserError: there is no data root, or the data are not as the layout demands.
    """
    from datasets import Dataset

    root = data_root or os.environ.get("KVBENCH_DATA")
    if not root:
        raise UserError(
            "MileBench's data root is not given; set KVBENCH_DATA or pass "
            '--metadata \'{"data_root": "FOLDER"}\''
        )
    extra = {"task": task, "image_paths": bool(image_paths)}
    samples = TASKS[task].load(Path(root)).samples
    return {"test": Dataset.from_list([sample.row() | extra for sample in samples])}


def doc_to_text(doc: Mapping[str, Any]) -> str:
    """The untruncated prompt with one `<image>` for each image and MileBench's newlines."""
    return newline_rule(_prompt(doc).text).replace(IMAGE_MARKER, MODEL_MARKER)


def doc_to_image(doc: Mapping[str, Any]) -> list[Image] | list[str]:
    """The prompt's images in order: opened, or as paths if the metadata say so."""
    images = _prompt(doc).images
    if doc["image_paths"]:
        return [str(path) for path in images]
    return [open_image(path) for path in images]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Scores the one answer in `results`."""
    score = TASKS[doc["task"]].score(Sample.from_row(doc), results[0])
    return {
        "acc": score.value,
        "strict": float(score.strict),
        "empty": float(score.empty),
        "unparsable": float(score.unparsable),
    }


def _prompt(doc: Mapping[str, Any]) -> Prompt:
    return TASKS[doc["task"]].prompt(Sample.from_row(doc), _Characters(), _UNLIMITED, 1)
