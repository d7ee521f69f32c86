"""Drawn samples as a folder in MileBench's layout, with the hash of what is in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.tasks.minimile.drawing import Drawing

SPLIT = "test"


@dataclass(frozen=True)
class Written:
    """What was written of one task: the number of images, the content's SHA-256."""

    images: int
    sha256: str


def image_level(images: int) -> str:
    """Name MileBench's group of a sample by its number of images."""
    return "Few" if images < 6 else "Medium" if images <= 31 else "Many"


def entry(drawing: Drawing, sample_id: int, instructions: int) -> dict[str, Any]:
    """Return a sample's annotation; the instruction wordings take turns."""
    names = [f"{sample_id}_{number}.png" for number in range(1, len(drawing.images) + 1)]
    return {
        "sample_id": sample_id,
        "task_instruction_id": sample_id % instructions,
        "task_instance": {
            "context": drawing.context,
            "images_path": names,
            "choice_list": list(drawing.choices),
        },
        "response": drawing.answer,
        "image_quantity_level": image_level(len(names)),
    }


def annotation(
    folder: str, entries: Sequence[dict[str, Any]], instructions: Sequence[str]
) -> dict[str, Any]:
    """Return a task's annotation file with its head."""
    head = {
        "dataset": folder,
        "split": SPLIT,
        "num_sample": len(entries),
        "question_type": "multi-choice",
        "task_instruction": list(instructions),
    }
    return {"meta_data": head, "data": list(entries)}


def write_task(
    root: Path, folder: str, drawings: Iterable[Drawing], instructions: Sequence[str]
) -> Written:
    """Write root/folder/folder.json and the images beside it.

    The hash covers pixels and annotation text, not the PNG encoding, which differs between
    versions of the imaging library.

    Raises:
        OSError: something cannot be written.
    """
    from PIL import Image

    images, digest = root / folder / "images", hashlib.sha256()
    images.mkdir(parents=True)
    entries, count = [], 0
    for sample_id, drawing in enumerate(drawings):
        entries.append(entry(drawing, sample_id, len(instructions)))
        for name, pixels in zip(
            entries[-1]["task_instance"]["images_path"], drawing.images, strict=True
        ):
            digest.update(pixels.tobytes())
            Image.fromarray(pixels).save(images / name, compress_level=1)
            count += 1
    text = json.dumps(annotation(folder, entries, instructions), indent=1) + "\n"
    digest.update(text.encode())
    (root / folder / f"{folder}.json").write_text(text, encoding="utf-8")
    return Written(count, digest.hexdigest())
