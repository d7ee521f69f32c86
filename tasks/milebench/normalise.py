"""The text normalisation MileBench applies to answers, truths and options alike."""

from __future__ import annotations

import re

MARKS = ';/[]"{}()=+\\_-><@`,?!'
"""Punctuation that is deleted or becomes a blank, in the official order."""

_GROUPED_DIGITS = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")

# The official code passes a regex flag where the count belongs: re.UNICODE is 32.
_FULL_STOPS_DELETED = 32


def normalise(text: str) -> str:
    """Lower-cases and thins out punctuation exactly as the official scorer does.

    A mark is deleted everywhere if it touches a blank anywhere or if the text holds a
    digit-comma-digit; otherwise it becomes a blank. Which of the two is decided on the text as
    it came, not on the partly changed one. Full stops not before a digit go, but only the
    first 32. Runs of blanks stay.
    """
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED_DIGITS.search(stripped) is not None
    changed = stripped
    for mark in MARKS:
        touches_blank = f"{mark} " in stripped or f" {mark}" in stripped
        changed = changed.replace(mark, "" if grouped or touches_blank else " ")
    changed = _FULL_STOP.sub("", changed, count=_FULL_STOPS_DELETED)
    return changed.strip("'").strip('"').strip().lower()
