"""Samples of several easy-VQA images with a question about one of them."""

from __future__ import annotations

from random import Random

from kvbench.tasks.easy_vqa.source import COLORS, SHAPES, YES_NO, image, load
from kvbench.tasks.minimile import Drawing
from kvbench.tasks.minimile.drawing import Picture, ask, compose, numbered

FOLDER = "EasyVQA"
IMAGES = 6
INSTRUCTIONS = ("Answer the question about one of the images.",)


def _picture(split: str, number: int) -> Picture:
    """Return an image with what the questions tell about it."""
    facts = load(split).facts.get(number, {})
    caption = " ".join(facts[key] for key in ("color", "shape") if key in facts)
    return Picture(image(split, number), caption or "shape", dict(facts))


def draw(rng: Random, split: str) -> Drawing:
    """Draw six images of a split and ask one of the k-th image's questions.

    Half of the questions ask for yes or no, a quarter for the color, a quarter for the shape.
    Among the yes-no questions each attribute, negation and answer is equally frequent, so that
    the words alone tell nothing.

    Args:
        rng: decides everything.
        split: "train" (4,000 images) or "test" (1,000 images).

    Raises:
        UserError: no such split, or the wheel easy-vqa or its data are missing.
    """
    data = load(split)
    wanted = rng.choice(("yes-no", "yes-no", "color", "shape"))
    kinds = [kind for kind in data.questions if len(kind) > 1]
    kind = rng.choice(kinds) if wanted == "yes-no" else (wanted,)
    text, answer, asked = rng.choice(data.questions[kind])
    shown = [n for n in rng.sample(data.images, IMAGES) if n != asked][: IMAGES - 1]
    position = rng.randrange(IMAGES)
    shown.insert(position, asked)
    options = YES_NO if wanted == "yes-no" else COLORS if wanted == "color" else SHAPES
    question = ask(rng, f"In image {position + 1}, {text}", answer, options)
    return compose(FOLDER, numbered("Image", [_picture(split, n) for n in shown]), question)
