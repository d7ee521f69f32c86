"""Frames with one colored shape each: object existence and state change."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from kvbench.tasks.minimile.canvas import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    blank,
    draw_shape,
    place,
    vary,
)
from kvbench.tasks.minimile.drawing import Drawing, Picture, ask, compose, numbered

OBJECTS = tuple((color, shape) for color in COLORS for shape in SHAPES)
CHANGES = ("color", "shape", "background", "nothing")


class Spot(NamedTuple):
    """Where an object's centre lies and half its size, pixels."""

    x: int
    y: int
    half: int


def any_spot(rng: Random) -> Spot:
    """Choose a size and a place wholly inside the image."""
    half = rng.randrange(9, 15)
    return Spot(rng.randrange(half, 64 - half), rng.randrange(half, 64 - half), half)


def photo(rng: Random, color: str, shape: str, background: str, spot: Spot) -> Picture:
    """Draw one object on a plain background."""
    image = blank(vary(rng, BACKGROUNDS[background], 6))
    draw_shape(image, shape, spot.half, spot.x, spot.y, vary(rng, COLORS[color]))
    facts = {
        "color": color,
        "shape": shape,
        "background": background,
        "place": place(spot.x, spot.y),
    }
    return Picture(image, f"{color} {shape}", facts)


def snapshot(rng: Random, color: str, shape: str) -> Picture:
    """Draw one object somewhere on any background."""
    return photo(rng, color, shape, rng.choice(tuple(BACKGROUNDS)), any_spot(rng))


def object_existence(rng: Random) -> Drawing:
    """Six frames with an object each; is a named object in any of them?"""
    shown = [rng.choice(OBJECTS) for _ in range(6)]
    pictures = [snapshot(rng, *pair) for pair in shown]
    answer = rng.choice(("yes", "no"))
    pool = shown if answer == "yes" else [pair for pair in OBJECTS if pair not in shown]
    text = f"Is there a {' '.join(rng.choice(pool))} in any image?"
    question = ask(rng, text, answer, ("yes", "no"))
    return compose("ObjectExistence", numbered("Image", pictures), question)


def _changed(rng: Random, state: dict[str, str], what: str) -> dict[str, str]:
    """Return the state with one attribute replaced by another value, or as it is."""
    values = {"color": tuple(COLORS), "shape": SHAPES, "background": tuple(BACKGROUNDS)}
    if what == "nothing":
        return state
    return state | {what: rng.choice([v for v in values[what] if v != state[what]])}


def state_change(rng: Random) -> Drawing:
    """Four frames of one object; which of its attributes differs at the end?"""
    answer = rng.choice(CHANGES)
    before = {
        "color": rng.choice(tuple(COLORS)),
        "shape": rng.choice(SHAPES),
        "background": rng.choice(tuple(BACKGROUNDS)),
    }
    after, since = _changed(rng, before, answer), rng.randrange(1, 4)
    pictures, spot = [], any_spot(rng)
    for number in range(4):
        state = after if number >= since else before
        picture = photo(rng, **state, spot=spot)
        caption = f"{picture.caption}, {state['background']} background"
        pictures.append(picture._replace(caption=caption))
    text = "What changes between the first and the last image?"
    question = ask(rng, text, answer, CHANGES)
    return compose("StateChange", numbered("Image", pictures), question)
