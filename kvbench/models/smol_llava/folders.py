"""Folders that are made once, whole or not at all, whoever else makes them at the same time."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """The user's cache folder for kvbench; it need not exist yet."""
    from platformdirs import user_cache_path

    return user_cache_path("kvbench")


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Returns `folder`, first calling `fill` on a fresh folder that becomes it if it is missing.

    A process that is killed half-way leaves no `folder`; processes that want the same folder
    wait for each other.

    Raises:
        OSError: the parent can't be written.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if folder.is_dir():
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            fill(unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    return folder
