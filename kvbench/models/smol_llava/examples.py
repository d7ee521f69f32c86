"""From a drawn sample to the token sequence that training reads.

The prompt is built by the functions that evaluation uses, so that both read the same tokens. After
the answer may follow short further turns about single images ("What does Image 2 show?"): they
cost few tokens and teach the model to find what is where long before the task itself does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Protocol

from kvbench.models.prompts import STYLES
from kvbench.models.smol_llava.architecture import IMAGE_TOKEN, TOKENS_PER_IMAGE
from kvbench.tasks import easy_vqa, minimile
from kvbench.tasks.milebench.prompt import full_text, newline_rule, place_markers
from kvbench.tasks.minimile import Drawing

LETTER_WEIGHT = 3.0
FURTHER_WEIGHT = 0.3
FOLDERS: tuple[str, ...] = (*minimile.FOLDERS, easy_vqa.FOLDER)
"""What is trained on, in the order of the evaluation's tables."""

_MARKER = re.compile(r"([^\n{}]+): \{(?:image|table)#\d+\}")
_LISTED = 6  # images up to which all captions are asked for at once


class Encode(Protocol):
    """Text to token ids; special tokens in the text are recognised, none are added."""

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text`."""


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        ids: token ids, every image expanded to its 64 tokens.
        image_starts: index in `ids` of every image's first token.
        targets: indices in `ids` of the tokens to be predicted.
        weights: what each of them counts in the loss.
        letter: which of `targets` is the answer's option letter.
        options: how many options the question has.
        task: index into `FOLDERS`.
        drawing: the images with their facts.
    """

    ids: list[int]
    image_starts: list[int]
    targets: list[int]
    weights: list[float]
    letter: int
    options: int
    task: int
    drawing: Drawing


def draw(folder: str, rng: Random, split: str) -> Drawing:
    """Draws a sample of one of `FOLDERS`; easy-VQA's images depend on the split."""
    if folder == easy_vqa.FOLDER:
        return easy_vqa.draw(rng, split)
    return minimile.draw(folder, rng)


def instruction(folder: str, rng: Random) -> str:
    """One of the task's instructions."""
    if folder == easy_vqa.FOLDER:
        return rng.choice(easy_vqa.INSTRUCTIONS)
    return rng.choice(minimile.INSTRUCTIONS[folder])


def prompt_text(drawing: Drawing, wording: str) -> str:
    """The exact text that evaluation gives to the processor, one `IMAGE_TOKEN` an image."""
    text = place_markers(full_text(drawing.context, drawing.choices), len(drawing.images))
    return STYLES["chatml"].render(newline_rule(f"{wording}\n{text}"))


def answer_text(drawing: Drawing) -> str:
    """Letter and text of the right option, as in "B. red circle"."""
    return f"{chr(ord('A') + drawing.choices.index(drawing.answer))}. {drawing.answer}"


def further_turns(drawing: Drawing, rng: Random) -> list[tuple[str, str]]:
    """Two to four questions with answers about what single images show."""
    markers = _MARKER.findall(drawing.context)
    if len(markers) != len(drawing.images):
        return []
    kinds: list[Callable[[], tuple[str, str] | None]] = [
        lambda: _what(markers, drawing, rng),
        lambda: _which(markers, drawing, rng),
        lambda: _detail(markers, drawing, rng),
    ]
    turns = [rng.choice(kinds)() for _ in range(rng.randint(2, 4))]
    if len(markers) <= _LISTED and rng.random() < 0.2:
        listed = "\n".join(map(": ".join, zip(markers, drawing.captions, strict=True)))
        turns[0] = ("What does each image show?", listed)
    return list(dict.fromkeys(turn for turn in turns if turn))


def _what(markers: list[str], drawing: Drawing, rng: Random) -> tuple[str, str]:
    k = rng.randrange(len(markers))
    return f"What does {markers[k]} show?", drawing.captions[k]


def _which(markers: list[str], drawing: Drawing, rng: Random) -> tuple[str, str] | None:
    k = rng.randrange(len(markers))
    if drawing.captions.count(drawing.captions[k]) > 1:
        return None
    return f"Which one shows {drawing.captions[k]}?", markers[k]


def _detail(markers: list[str], drawing: Drawing, rng: Random) -> tuple[str, str] | None:
    k = rng.randrange(len(markers))
    facts = drawing.facts[k]
    if not facts:
        return None
    name = rng.choice(sorted(facts))
    return f"{markers[k]}, {name.replace('_', ' ')}?", facts[name]


class Sequencer:
    """Turns drawings into examples with one tokenizer.

    Attributes:
        encode: text to ids, with special tokens recognised and none added.
        image_token: the id that stands for an image's content.
        end: the id that ends a turn.
    """

    def __init__(self, encode: Encode, image_token: int, end: int) -> None:
        # Most pieces between images recur ("\nImage 2: "), so few are really tokenised.
        self.encode = lru_cache(maxsize=100_000)(lambda text: tuple(encode(text)))
        self.image_token = image_token
        self.end = end

    def prompt(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt with images expanded, and the index of each image's first token.

        The image token is special, so the pieces around it are tokenised apart anyway.
        """
        ids: list[int] = []
        starts: list[int] = []
        for number, piece in enumerate(text.split(IMAGE_TOKEN)):
            if number:
                starts.append(len(ids))
                ids += [self.image_token] * TOKENS_PER_IMAGE
            if piece:
                ids += self.encode(piece)
        return ids, starts

    def example(self, drawing: Drawing, task: int, rng: Random, further: bool) -> Example:
        """The sequence of one drawing.

        Args:
            drawing: what to ask.
            task: index into `FOLDERS`.
            rng: chooses the instruction and the further turns.
            further: whether turns about single images follow the answer.
        """
        ids, starts = self.prompt(prompt_text(drawing, instruction(drawing.folder, rng)))
        letter, rest = answer_text(drawing)[:1], answer_text(drawing)[1:]
        targets: list[int] = []
        weights: list[float] = []

        def say(tokens: tuple[int, ...], weight: float) -> None:
            targets.extend(range(len(ids), len(ids) + len(tokens)))
            weights.extend([weight] * len(tokens))
            ids.extend(tokens)

        say(self.encode(letter), LETTER_WEIGHT)
        say((*self.encode(rest), self.end), 1.0)
        for question, reply in further_turns(drawing, rng) if further else ():
            ids += self.encode("\n<|im_start|>user\n")
            ids += self.encode(f"{question}<|im_end|>\n<|im_start|>assistant\n")
            say((*self.encode(reply), self.end), FURTHER_WEIGHT)
        return Example(ids, starts, targets, weights, 0, len(drawing.choices), task, drawing)
