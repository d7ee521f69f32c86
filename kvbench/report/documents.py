"""What verbs leave in their folders as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvbench.errors import UserError


def read_document(path: Path, verb: str) -> dict[str, Any]:
    """Read the object that `kvbench VERB` wrote.

    Raises:
        UserError: it can't be read.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path} ({error}): run kvbench {verb} again") from error
    return document
