"""What a drawn sample is, and how pictures, a question and options become one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from kvbench.tasks.minimile.canvas import Pixels


@dataclass(frozen=True)
class Drawing:
    """One drawn sample, before it is written.

    Attributes:
        folder: MileBench's folder of the task ("ObjectExistence").
        context: text with {image#k} placeholders, ending with the question, without options.
        choices: option texts without letters, unique, in the order shown.
        answer: the right one of the choices.
        images: uint8 arrays of shape (64, 64, 3), RGB, in placeholder order.
        captions: a few lower-case words for each image.
        facts: what is to be seen in each image, attribute -> value of FACT_VOCABULARY.
    """

    folder: str
    context: str
    choices: tuple[str, ...]
    answer: str
    images: list[Pixels]
    captions: tuple[str, ...]
    facts: tuple[dict[str, str], ...]


class Picture(NamedTuple):
    """One image with the words and facts that describe it."""

    pixels: Pixels
    caption: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question with its options, shuffled, and the right one."""

    text: str
    choices: tuple[str, ...]
    answer: str


def ask(rng: Random, text: str, answer: str, others: Iterable[str], options: int = 4) -> Question:
    """Return a question whose wrong options are drawn from others, all in random order."""
    pool = [other for other in dict.fromkeys(others) if other != answer]
    choices = [answer, *rng.sample(pool, min(options - 1, len(pool)))]
    rng.shuffle(choices)
    return Question(text, tuple(choices), answer)


def compose(
    folder: str, pictures: Mapping[str, Picture], question: Question, tables: Sequence[str] = ()
) -> Drawing:
    """Join pictures, each under its marker ("Image 1"), and a question to a sample.

    Args:
        folder: the task's folder.
        pictures: marker -> picture, in the order shown.
        question: the question asked about them.
        tables: markers whose picture is a table and gets MileBench's {table#k} placeholder.
    """
    kinds = ["table" if marker in tables else "image" for marker in pictures]
    lines = [
        f"{marker}: {{{kind}#{number}}}"
        for number, (marker, kind) in enumerate(zip(pictures, kinds, strict=True), start=1)
    ]
    return Drawing(
        folder=folder,
        context="\n".join([*lines, f"Question: {question.text}"]),
        choices=question.choices,
        answer=question.answer,
        images=[picture.pixels for picture in pictures.values()],
        captions=tuple(picture.caption for picture in pictures.values()),
        facts=tuple(picture.facts for picture in pictures.values()),
    )


def numbered(noun: str, pictures: Sequence[Picture]) -> dict[str, Picture]:
    """Put pictures under the markers "noun 1", "noun 2", ..."""
    return {f"{noun} {number}": picture for number, picture in enumerate(pictures, 1)}
