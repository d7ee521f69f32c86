"""The one exception users are meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints the message and exits with code 2; no traceback.
    """


def brief(text: str) -> str:
    """A user's own text for a message: on one line, not longer than 100 characters."""
    line = repr(text)[1:-1]
    return line if len(line) <= 100 else line[:97] + "..."
