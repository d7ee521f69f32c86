"""From a multiple-choice answer to one option's label, by MileBench's official rules."""

from __future__ import annotations

from collections.abc import Sequence

from kvbench.tasks.milebench.normalise import normalise

EMPTY_ANSWER_LABEL = "C"
"""What the official scorer takes an empty answer for."""

# Regex specials that survive normalisation; "." survives before a digit.
_ESCAPED = frozenset(".^$*|")


def label(index: int) -> str:
    """An option's label in scoring: A ... Z, then AA ... AZ, BA ..."""
    letter = chr(ord("A") + index % 26)
    return letter if index < 26 else chr(ord("A") + index // 26 - 1) + letter


def _first_named(text: str, names: Sequence[str]) -> int | None:
    """Index of the name that begins leftmost in `text`; the lowest index among equals."""
    found = [(text.find(name), index) for index, name in enumerate(names)]
    return min(((at, index) for at, index in found if at >= 0), default=(0, None))[1]


def _by_label_and_text(answer: str, options: Sequence[str]) -> str | None:
    names = [normalise(f"{label(index)} {option}") for index, option in enumerate(options)]
    index = _first_named(answer, names)
    # The first character only, so a label of two letters can never come out of this rule.
    return None if index is None else names[index][0].upper()


def _by_text(answer: str, options: Sequence[str]) -> str | None:
    # Normalised once more, as the official code does: it isn't idempotent.
    names = [normalise(option).replace(" ", "") for option in options]
    index = _first_named(answer.replace(" ", ""), names)
    # The official code compares the match with its regex-escaped option, which fails here.
    if index is None or not _ESCAPED.isdisjoint(names[index]):
        return None
    return label(names.index(names[index]))


def _by_label(answer: str, labels: Sequence[str]) -> str | None:
    return answer.upper() if len(answer) <= 2 and answer.upper() in labels else None


def extract(answer: str, options: Sequence[str]) -> str:
    """The label an answer stands for; may be empty or several letters in a row.

    The first rule that yields something wins: an empty answer is "C"; label and text ("b red");
    text alone, blanks ignored; a bare label; else every character that is itself a label.

    Args:
        answer: the normalised answer.
        options: the normalised option texts.
    """
    if not answer:
        return EMPTY_ANSWER_LABEL
    labels = [label(index) for index in range(len(options))]
    for found in (
        _by_label_and_text(answer, options),
        _by_text(answer, options),
        _by_label(answer, labels),
    ):
        if found is not None:
            return found
    return "".join(letter for letter in map(str.upper, answer) if letter in labels)


def strictly_right(answer: str, choices: Sequence[str], right: int) -> bool:
    """Whether the raw answer is nothing but option number `right`.

    Accepted, case and outer white space aside: its label, its label with ".", ")" or ":" and
    perhaps its text after that, or its text alone.
    """
    given, letter = answer.strip().casefold(), label(right).casefold()
    text = choices[right].strip().casefold()
    if not given:
        return False
    if given in (letter, text):
        return True
    head, rest = given[: len(letter) + 1], given[len(letter) + 1 :].strip()
    return head in {letter + mark for mark in ".):"} and rest in ("", text)
