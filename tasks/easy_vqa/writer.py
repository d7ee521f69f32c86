"""easy-VQA on disk in MileBench's layout, made from the installed wheel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.tasks.easy_vqa.drawing import FOLDER, INSTRUCTIONS, draw
from kvbench.tasks.minimile.folder import create, create_cached
from kvbench.tasks.minimile.layout import SPLIT, Written, write_task
from kvbench.tasks.minimile.writer import sample_rng

VERSION = 1
"""Raised whenever a sample changes."""

MANIFEST = "easy_vqa.json"
SEED = 0
SAMPLES = 200


def make(root: Path, samples: int = SAMPLES, seed: int = SEED) -> None:
    """Write samples of the test images as the folder EasyVQA in MileBench's layout.

    The set appears at root when it is complete; if it is there already, nothing happens.

    Raises:
        UserError: root holds something else or cannot be written, samples is not positive, or
            the wheel easy-vqa is missing.
    """
    create(root, MANIFEST, _manifest(samples, seed), partial(_build, samples, seed))


def default_root() -> Path:
    """Return the folder of the default set (seed 0, 200 samples), made on first use.

    Raises:
        UserError: the wheel easy-vqa is missing, or the cache folder cannot be written.
    """
    from platformdirs import user_cache_path

    root = user_cache_path("kvbench") / f"easy-vqa-{VERSION}-seed{SEED}-{SAMPLES}"
    build = partial(_build, SAMPLES, SEED)
    return create_cached(root, MANIFEST, _manifest(SAMPLES, SEED), build)


def _manifest(samples: int, seed: int) -> dict[str, Any]:
    """Return what the set is made of, after checking it."""
    if samples < 1:
        raise UserError(f"easy-VQA cannot have {samples} samples; ask for at least 1.")
    return {"generator": "easy-vqa", "version": VERSION, "seed": seed, "samples": samples}


def _build(samples: int, seed: int, root: Path) -> dict[str, Written]:
    """Write the task below root."""
    generators = (sample_rng(SPLIT, FOLDER, seed, index) for index in range(samples))
    drawings = (draw(rng, SPLIT) for rng in generators)
    return {FOLDER: write_task(root, FOLDER, drawings, INSTRUCTIONS)}
