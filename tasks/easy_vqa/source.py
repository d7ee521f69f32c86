"""The images and questions of the easy-vqa wheel, read where it is installed, never imported."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvbench.errors import UserError
from kvbench.tasks.minimile import IMAGE_SIZE, Pixels

SPLITS = ("train", "test")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
YES_NO = ("yes", "no")
INSTALL = "install it with: pip install --no-deps easy-vqa"

_NAMED = re.compile(rf"\b({'|'.join((*COLORS, *SHAPES))})\b")
_NEGATED = re.compile(r"\b(not|no)\b")

Kind = tuple[str, ...]
"""What is asked: ("color",), ("shape",), or ("color", "negated", "yes") and the like."""


class Entry(NamedTuple):
    """One question of the data set about one image."""

    text: str
    answer: str
    image: int


@dataclass(frozen=True)
class Split:
    """The questions of a split by kind, and what they tell about each image."""

    folder: Path
    questions: dict[Kind, tuple[Entry, ...]]
    facts: dict[int, dict[str, str]]
    images: tuple[int, ...]


def _attribute(word: str) -> str:
    return "color" if word in COLORS else "shape"


def _kind(entry: Entry) -> Kind:
    """Return what an entry asks for; yes-no questions differ in attribute, negation and answer."""
    if entry.answer not in YES_NO:
        return (_attribute(entry.answer),)
    named = _NAMED.search(entry.text)
    attribute = _attribute(named.group()) if named else ""
    return (attribute, "negated" if _NEGATED.search(entry.text) else "plain", entry.answer)


def _told(entry: Entry) -> list[str]:
    """Return the colors and shapes that an entry says its image has."""
    named = _NAMED.findall(entry.text)
    if entry.answer not in YES_NO:
        return [entry.answer, *named]
    negated = _NEGATED.search(entry.text) is not None
    return named if (entry.answer == "yes") != negated else []


def _data_folder() -> Path:
    """Return the wheel's data folder without importing the package."""
    spec = find_spec("easy_vqa")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise UserError(f"The easy-VQA task needs the package easy-vqa; {INSTALL}.")
    return Path(places[0]) / "data"


def _entries(path: Path) -> list[Entry]:
    """Read a split's questions."""
    try:
        return [Entry(*row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"The questions of easy-vqa cannot be read from {path} ({error}); {INSTALL}."
        ) from error


@cache
def load(split: str) -> Split:
    """Read a split's questions once a process.

    Raises:
        UserError: no such split, or the wheel or its data are missing.
    """
    if split not in SPLITS:
        raise UserError(f"easy-VQA has no split {split!r}; it has {' and '.join(SPLITS)}.")
    folder = _data_folder() / split
    questions: dict[Kind, list[Entry]] = defaultdict(list)
    facts: dict[int, dict[str, str]] = defaultdict(dict)
    for entry in _entries(folder / "questions.json"):
        questions[_kind(entry)].append(entry)
        facts[entry.image] |= {_attribute(word): word for word in _told(entry)}
    by_kind = {kind: tuple(entries) for kind, entries in sorted(questions.items())}
    return Split(folder / "images", by_kind, dict(facts), tuple(sorted(facts)))


@cache
def image(split: str, number: int) -> Pixels:
    """Decode an image once a process: uint8 of shape (64, 64, 3), RGB, not to be written to.

    Raises:
        UserError: the file is missing, broken or of another size.
    """
    from PIL import Image

    path = load(split).folder / f"{number}.png"
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path} cannot be read ({error}); {INSTALL}.") from error
    if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(f"{path} is not {IMAGE_SIZE} x {IMAGE_SIZE} pixels; {INSTALL}.")
    pixels.flags.writeable = False
    return pixels
