"""The one exception users are meant to see."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one sentence: what is wrong, where, and what to do about it.

    The command line prints the message and exits with code 2; no traceback.
    """
