"""Things that move: an object with a trail, a hand that takes an object."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from kvbench.tasks.minimile.canvas import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Color,
    Pixels,
    blank,
    box,
    draw_shape,
    vary,
)
from kvbench.tasks.minimile.drawing import Drawing, Picture, Question, ask, compose, numbered

HALF = 8  # of an object's size, pixels
COLUMNS = {"left": 11, "middle": 32, "right": 53}
HAND: Color = (0, 0, 0)
GRASPABLE = tuple(color for color in COLORS if color != "black")  # the hand is black
BRIGHT = ("white", "pink", "cyan")


class _Path(NamedTuple):
    """Where things are while one moves along an axis of the image."""

    upright: bool  # moves along a column, not a row
    forward: bool  # towards larger coordinates
    across: int  # the moving object's fixed coordinate
    rest: tuple[int, int]  # x, y of the object that does not move


def _path(rng: Random) -> _Path:
    """Choose a straight path in one half of the image and a resting place in the other."""
    across, beyond, along = rng.randrange(12, 17), rng.randrange(43, 54), rng.randrange(10, 54)
    if rng.random() < 0.5:
        across, beyond = 63 - across, 63 - beyond
    upright = rng.random() < 0.5
    rest = (beyond, along) if upright else (along, beyond)
    return _Path(upright, rng.random() < 0.5, across, rest)


def _draw_moving(image: Pixels, shape: str, color: Color, path: _Path, along: int) -> None:
    """Draw an object at a point of its path, three streaks of its color behind it."""
    centre = along if path.forward else 63 - along
    start = centre - HALF - 15 if path.forward else centre + HALF + 3
    for offset in (-6, 0, 6):
        row = path.across + offset - 1
        if path.upright:
            box(image, row, start, row + 2, start + 13, color)
        else:
            box(image, start, row, start + 13, row + 2, color)
    x, y = (path.across, centre) if path.upright else (centre, path.across)
    draw_shape(image, shape, HALF, x, y, color)


def _moving_question(rng: Random, moving: tuple[str, str], still: tuple[str, str]) -> Question:
    """Ask for the color or the shape of the moving object; the still one's is an option."""
    if rng.random() < 0.5:
        others = rng.sample([color for color in COLORS if color not in (moving[0], still[0])], 2)
        return ask(rng, "What is the color of the moving object?", moving[0], (still[0], *others))
    return ask(rng, "What is the shape of the moving object?", moving[1], SHAPES)


def moving_attribute(rng: Random) -> Drawing:
    """Six frames: one object rests, one moves and leaves a trail; what is the moving one like?"""
    (color, other_color), (shape, other_shape) = rng.sample(tuple(COLORS), 2), rng.sample(SHAPES, 2)
    path, background = _path(rng), vary(rng, BACKGROUNDS[rng.choice(BRIGHT)], 6)
    facts = {
        "moving_color": color,
        "moving_shape": shape,
        "still_color": other_color,
        "still_shape": other_shape,
    }
    caption = f"moving {color} {shape}, still {other_color} {other_shape}"
    pictures = []
    for number in range(6):
        image = blank(background)
        draw_shape(image, other_shape, HALF, *path.rest, vary(rng, COLORS[other_color]))
        along = 24 + 6 * number + rng.randrange(2)
        _draw_moving(image, shape, vary(rng, COLORS[color]), path, along)
        pictures.append(Picture(image, caption, dict(facts)))
    question = _moving_question(rng, (color, shape), (other_color, other_shape))
    return compose("MovingAttribute", numbered("Image", pictures), question)


def _draw_hand(image: Pixels, x: int, low: int) -> None:
    """Draw an arm from above, a palm at row low and two fingers down from it."""
    box(image, x - 3, 0, x + 4, low, HAND)
    box(image, x - 10, low - 4, x + 11, low, HAND)
    for finger in (x - 10, x + 8):
        box(image, finger, low, finger + 3, low + 19, HAND)


def _scene(
    rng: Random, objects: dict[str, tuple[str, str]], hand: str, takes: bool, background: Color
) -> Picture:
    """Draw three objects side by side and the hand above one of them or around it."""
    image = blank(background)
    facts = {f"{column}_color": color for column, (color, _) in objects.items()}
    facts |= {f"{column}_shape": shape for column, (_, shape) in objects.items()}
    for column, (color, shape) in objects.items():
        draw_shape(image, shape, 7, COLUMNS[column], 52, vary(rng, COLORS[color]))
    _draw_hand(image, COLUMNS[hand], 43 if takes else rng.randrange(5, 20))
    caption = ", ".join(" ".join(pair) for pair in objects.values())
    color, shape = objects[hand] if takes else ("none", "none")
    caption += f", hand takes {color} {shape}" if takes else ", hand open"
    return Picture(image, caption, facts | {"hand_color": color, "hand_shape": shape})


def object_interaction(rng: Random) -> Drawing:
    """Four frames: a hand moves above three objects and takes one of them in the last."""
    named = [(color, rng.choice(SHAPES)) for color in rng.sample(GRASPABLE, 4)]
    # The fourth is an option and in no image.
    objects = dict(zip(COLUMNS, named[:3], strict=True))
    target = rng.choice(tuple(COLUMNS))
    background = vary(rng, BACKGROUNDS[rng.choice(BRIGHT)], 6)
    hands = [rng.choice(tuple(COLUMNS)) for _ in range(3)] + [target]
    pictures = [
        _scene(rng, objects, hand, number == 3, background) for number, hand in enumerate(hands)
    ]
    names = [" ".join(pair) for pair in named]
    question = ask(rng, "Which object does the hand take?", " ".join(objects[target]), names)
    return compose("ObjectInteraction", numbered("Image", pictures), question)
