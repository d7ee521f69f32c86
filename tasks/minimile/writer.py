"""minimile on disk: made where the user says, or once in the user's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from kvbench.errors import UserError
from kvbench.tasks.minimile.catalog import FOLDERS, INSTRUCTIONS, draw
from kvbench.tasks.minimile.drawing import Drawing
from kvbench.tasks.minimile.folder import create, create_cached
from kvbench.tasks.minimile.layout import SPLIT, Written, write_task

VERSION = 1
"""Raised whenever a sample's pixels or words change."""

MANIFEST = "minimile.json"
SEED = 0
SAMPLES = 200
CALIBRATION_SEED = 9000
"""The set of this seed is the calibration split, which no task scores."""


def sample_rng(split: str, folder: str, seed: int, index: int) -> Random:
    """Return the generator that decides one sample; no two splits, seeds or samples share one."""
    return Random(f"{split}/{folder}/{seed}/{index}")


def make(
    root: Path, seed: int = SEED, samples: int = SAMPLES, folders: Sequence[str] = FOLDERS
) -> None:
    """Write the test split in MileBench's layout, with a manifest, in a few seconds.

    The set appears at root when it is complete; if it is there already, nothing happens.

    Args:
        root: a new or empty folder.
        seed: which of the infinitely many test sets.
        samples: samples a task.
        folders: which of FOLDERS.

    Raises:
        UserError: root holds something else or cannot be written, samples is not positive, or
            there is no such task.
    """
    build = partial(_build, seed, samples, folders)
    create(root, MANIFEST, _manifest(seed, samples, folders), build)


def default_root() -> Path:
    """Return the folder of the default test set (seed 0, 200 samples a task), made on first use.

    Raises:
        UserError: the user's cache folder cannot be written.
    """
    return cached_root(SEED, SAMPLES)


def cached_root(seed: int, samples: int) -> Path:
    """Return the folder of a test set in the user's cache, made on first use.

    Raises:
        UserError: the user's cache folder cannot be written.
    """
    from platformdirs import user_cache_path

    root = user_cache_path("kvbench") / f"minimile-{VERSION}-seed{seed}-{samples}"
    build = partial(_build, seed, samples, FOLDERS)
    return create_cached(root, MANIFEST, _manifest(seed, samples, FOLDERS), build)


def calibration_root(samples: int) -> Path:
    """Return the folder of the calibration split in the user's cache, made on first use.

    Raises:
        UserError: the user's cache folder cannot be written.
    """
    return cached_root(CALIBRATION_SEED, samples)


def _manifest(seed: int, samples: int, folders: Sequence[str]) -> dict[str, Any]:
    """Return what the set is made of, after checking it."""
    unknown = [folder for folder in folders if folder not in FOLDERS]
    if unknown or not folders:
        raise UserError(
            f"minimile has no task folder {', '.join(map(repr, unknown)) or 'in an empty list'}; "
            f"it has {', '.join(FOLDERS)}."
        )
    if samples < 1:
        raise UserError(f"minimile cannot have {samples} samples a task; ask for at least 1.")
    return {
        "generator": "minimile",
        "version": VERSION,
        "seed": seed,
        "samples": samples,
        "folders": list(folders),
    }


def _build(seed: int, samples: int, folders: Sequence[str], root: Path) -> dict[str, Written]:
    """Write the tasks below root."""
    return {
        folder: write_task(root, folder, _drawings(seed, samples, folder), INSTRUCTIONS[folder])
        for folder in folders
    }


def _drawings(seed: int, samples: int, folder: str) -> Iterator[Drawing]:
    """Draw a task's samples one after the other."""
    for index in range(samples):
        yield draw(folder, sample_rng(SPLIT, folder, seed, index))
