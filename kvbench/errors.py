"""The one exception users are meant to see."""

from __future__ import annotations

import traceback
from pathlib import Path

_LIBRARIES = {"torch", "transformers", "triton"}
"""Errors of arguments come up deep in them, but were made by whoever called."""


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints the message and exits with code 2; no traceback.
    """


class Mistake(UserError):
    """Code that someone added to kvbench, a method say, does what its author can't have meant."""


def brief(text: str) -> str:
    """A user's own text for a message: on one line, not longer than 100 characters."""
    line = repr(text)[1:-1]
    return line if len(line) <= 100 else line[:97] + "..."


def fault(error: BaseException) -> str:
    """What another's code raised and where, for a message: `TypeError: …, FILE:12`.

    The last line of the traceback outside of torch and transformers stands for the place; a syntax
    error names its own.
    """
    what = f"{type(error).__name__}: {error}".rstrip(": ").replace("\n", " ")
    if isinstance(error, SyntaxError):
        return f"{what.rpartition(' (')[0]}, {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [of for of in frames if not _LIBRARIES & set(Path(of.filename).parts)] or frames
    return f"{what}, {own[-1].filename}:{own[-1].lineno}" if own else what
