"""Folders that are either whole or not there: built beside their place, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.tasks.minimile.layout import Written

Manifest = Mapping[str, Any]
"""What a set was made of (generator, version, seed, samples), without its content."""

Build = Callable[[Path], dict[str, Written]]
"""Writes all tasks below a folder that exists and is empty; returns folder -> what is there."""


def is_whole(root: Path, name: str, manifest: Manifest) -> bool:
    """Tell whether root holds exactly the set of this manifest, with all of its files."""
    try:
        found = json.loads((root / name).read_text(encoding="utf-8"))
        same = all(found[key] == value for key, value in manifest.items())
        return same and all(
            (root / folder / f"{folder}.json").is_file()
            and sum(1 for _ in os.scandir(root / folder / "images")) == images
            for folder, images in found["images"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def create(root: Path, name: str, manifest: Manifest, build: Build) -> None:
    """Build a set at root, with its manifest in the file name; nothing to do if it is there.

    Raises:
        UserError: root holds something else, or cannot be written.
    """
    if is_whole(root, name, manifest):
        return
    partial = root.parent / f".{root.name}.{os.getpid()}.partial"
    try:
        _refuse_foreign(root)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that had this number before
        partial.mkdir(parents=True)
        written = build(partial)
        content = {
            **manifest,
            "images": {folder: task.images for folder, task in written.items()},
            "sha256": {folder: task.sha256 for folder, task in written.items()},
        }
        (partial / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, root)
    except OSError as error:
        raise UserError(
            f"The data set cannot be written to {root} ({error.strerror or error}); "
            f"make room there or name another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def create_cached(root: Path, name: str, manifest: Manifest, build: Build) -> Path:
    """Return root after making it whole: for the user's cache, where what is broken may go.

    Processes that want the same set at once wait for the first of them.

    Raises:
        UserError: root cannot be written.
    """
    from filelock import FileLock

    if is_whole(root, name, manifest):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.parent / f"{root.name}.lock"):
            if not is_whole(root, name, manifest):
                _clear(root)
                create(root, name, manifest, build)
    except OSError as error:
        raise UserError(
            f"The cache folder {root.parent} cannot be written ({error.strerror or error}); "
            f"set XDG_CACHE_HOME to a folder that can."
        ) from error
    return root


def _refuse_foreign(root: Path) -> None:
    """Raise UserError unless root is absent or an empty folder."""
    if root.is_dir() and not any(root.iterdir()):
        return
    if root.exists() or root.is_symlink():
        raise UserError(
            f"{root} exists and is not this data set; name a new or empty folder, or remove it."
        )


def _clear(root: Path) -> None:
    """Remove a broken set and what interrupted processes left beside it."""
    for leftover in (root, *root.parent.glob(f".{root.name}.*.partial")):
        if leftover.exists():
            shutil.rmtree(leftover)
