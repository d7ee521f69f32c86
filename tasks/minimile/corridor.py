"""Egocentric navigation: a walk through rooms with colored doors, seen by the walker."""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np

from kvbench.tasks.minimile.canvas import (
    COLORS,
    IMAGE_SIZE,
    Color,
    Mask,
    Pixels,
    blank,
    box,
    paint,
    vary,
)
from kvbench.tasks.minimile.drawing import Drawing, Picture, ask, compose, numbered

STEPS = 12
MOVES = {"left": "turn left", "ahead": "go forward", "right": "turn right", "near": "stop"}
SIDES = ("left", "ahead", "right")
DOORS = tuple(color for color in COLORS if color != "black")
NONE = "none"
CEILING: Color = (225, 225, 225)
FLOOR: Color = (120, 110, 100)
SIDE_WALL: Color = (190, 190, 185)
BACK_WALL: Color = (210, 210, 205)
EDGE = 18  # column at which the side wall meets the back wall
HANDLE: Color = (15, 15, 15)

View = dict[str, str]
"""Door color or "none" for each of "left", "ahead", "right", and "near": right in front."""


@cache
def _left_wall(first: int, last: int, top: int) -> Mask:
    """Return a trapezoid on the left wall: columns first..last-1, from row top at the left edge."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    below_top = EDGE * y >= EDGE * top + (14 + top // 2 - top) * x
    above_floor = EDGE * y <= EDGE * 63 - 14 * x
    return np.asarray((x >= first) & (x < last) & below_top & above_floor)


def _room(rng: Random) -> Pixels:
    """Draw ceiling, floor and the three walls that the walker sees."""
    image = blank(vary(rng, CEILING))
    box(image, 0, 32, 64, 64, vary(rng, FLOOR))
    wall = vary(rng, SIDE_WALL)
    paint(image, _left_wall(0, EDGE, 0), 0, 0, wall)
    paint(image, _left_wall(0, EDGE, 0)[:, ::-1], 0, 0, wall)
    box(image, EDGE, 14, 64 - EDGE, 50, vary(rng, BACK_WALL))
    return image


def _view(rng: Random, view: View) -> Picture:
    """Draw what the walker sees; a door right in front hides everything else."""
    image, shift = _room(rng), rng.randrange(3)
    side_door = _left_wall(2 + shift, 14 + shift, 12)
    if view["left"] != NONE:
        paint(image, side_door, 0, 0, vary(rng, COLORS[view["left"]]))
    if view["right"] != NONE:
        paint(image, side_door[:, ::-1], 0, 0, vary(rng, COLORS[view["right"]]))
    if view["ahead"] != NONE:
        left = 22 + 2 * shift
        box(image, left, 20, left + 16, 50, vary(rng, COLORS[view["ahead"]]))
    if view["near"] != NONE:
        box(image, 6, 4, 58, 64, vary(rng, COLORS[view["near"]]))
        box(image, 46, 34, 52, 40, HANDLE)
    caption = ", ".join(f"{side} {color}" for side, color in view.items() if color != NONE)
    return Picture(image, caption, {f"door_{side}": color for side, color in view.items()})


def _junction(rng: Random, doors: dict[str, str]) -> View:
    """Return a view with the given doors, and others or none at the open sides."""
    free = [color for color in DOORS if color not in doors.values()]
    others = dict(zip(SIDES, rng.sample(free, 3), strict=True))
    others = {side: NONE if rng.random() < 0.2 else color for side, color in others.items()}
    return {"near": NONE} | others | doors


def _visit(rng: Random, color: str) -> list[View]:
    """Return the views from a room's middle to its door of that color, right in front of it."""
    side = rng.choice(SIDES)
    views = [_junction(rng, {side: color})]
    if side != "ahead":
        views.append(_junction(rng, {"ahead": color}))
    nowhere = dict.fromkeys(SIDES, NONE)
    return [*views, nowhere | {"near": color}]


def egocentric_navigation(rng: Random) -> Drawing:
    """Twelve views of a walk; which move comes next on the way to a door of a given color?"""
    target, move = rng.choice(DOORS), rng.choice(tuple(MOVES))
    last = _visit(rng, target) if move == "near" else [_junction(rng, {move: target})]
    views: list[View] = last
    while len(views) < STEPS:
        views = [*_visit(rng, rng.choice([c for c in DOORS if c != target])), *views]
    pictures = [_view(rng, view) for view in views[-STEPS:]]
    text = f"You want to stop at the {target} door. What is the next move?"
    question = ask(rng, text, MOVES[move], MOVES.values())
    return compose("EgocentricNavigation", numbered("Step", pictures), question)
