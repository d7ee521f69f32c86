"""Writing a whole file so that a reader sees the old or the new one, never half of either."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from kvbench.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write content beside ``path``, push it to the disk and rename it over ``path``.

    Text is written as UTF-8.

    Raises:
        UserError: The folder can't be written to, or the disk is full.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
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
