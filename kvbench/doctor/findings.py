"""One thing that was looked at, how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

NOTHING = "nothing to do"


class Status(StrEnum):
    """How a thing is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; results are right all the same."""
    FAIL = "fail"
    """Something won't run, or its numbers can't be trusted."""


@dataclass(frozen=True)
class Finding:
    """A finding of one section of the examination."""

    section: str
    status: Status
    name: str
    text: str
    advice: str = NOTHING
