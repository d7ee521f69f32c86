"""Writing a whole file so that a reader sees the old or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from kvbench.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write text (UTF-8) beside ``path``, push it to the disk and rename it over ``path``.

    Raises:
        UserError: The folder can't be written to, or the disk is full.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared result from colleagues
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise UserError(
            f"can't write {path} ({error.strerror or error}): free space, or choose another folder"
        ) from error
