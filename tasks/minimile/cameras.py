"""Space understanding: six cameras around a car, each with something on the road."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvbench.tasks.minimile.canvas import COLORS, Color, Pixels, blank, box, draw_shape, vary
from kvbench.tasks.minimile.drawing import Drawing, Picture, ask, compose

CAMERAS = (
    "front left camera",
    "front camera",
    "front right camera",
    "back left camera",
    "back camera",
    "back right camera",
)
TIRE: Color = (40, 40, 40)
GLASS: Color = (215, 235, 245)
WHITE: Color = (250, 250, 250)


def _wheels(image: Pixels, *centres: int) -> None:
    """Draw wheels on the ground."""
    for x in centres:
        draw_shape(image, "circle", 5, x, 52, TIRE)
        draw_shape(image, "circle", 2, x, 52, WHITE)


def _car(image: Pixels, x: int, color: Color) -> None:
    """A low body with a cabin on its middle."""
    box(image, x - 20, 38, x + 20, 50, color)
    box(image, x - 11, 28, x + 11, 38, color)
    box(image, x - 8, 31, x + 8, 37, GLASS)
    _wheels(image, x - 12, x + 12)


def _truck(image: Pixels, x: int, color: Color) -> None:
    """A high load, a gap, and a lower cab."""
    box(image, x - 21, 16, x + 6, 48, color)
    box(image, x + 9, 30, x + 21, 48, color)
    box(image, x + 12, 32, x + 19, 38, GLASS)
    box(image, x - 21, 46, x + 21, 49, TIRE)
    _wheels(image, x - 13, x + 14)


def _bus(image: Pixels, x: int, color: Color) -> None:
    """One long high body with a row of windows."""
    box(image, x - 22, 18, x + 22, 50, color)
    for left in range(x - 19, x + 16, 10):
        box(image, left, 23, left + 7, 33, GLASS)
    _wheels(image, x - 13, x + 13)


def _cone(image: Pixels, x: int, color: Color) -> None:
    """A traffic cone with a white stripe and a foot."""
    draw_shape(image, "triangle", 16, x, 36, color)
    box(image, x - 6, 36, x + 7, 41, WHITE)
    box(image, x - 18, 51, x + 19, 56, color)


def _person(image: Pixels, x: int, color: Color) -> None:
    """A pedestrian in colored clothes."""
    draw_shape(image, "circle", 6, x, 14, (235, 190, 150))
    box(image, x - 8, 20, x + 9, 40, color)
    box(image, x - 7, 40, x - 1, 58, color)
    box(image, x + 2, 40, x + 8, 58, color)


VEHICLES: dict[str, Callable[[Pixels, int, Color], None]] = {
    "car": _car,
    "truck": _truck,
    "bus": _bus,
    "cone": _cone,
    "person": _person,
}


def _street(rng: Random, color: str, vehicle: str) -> Picture:
    """Draw a road user in front of sky and road."""
    image = blank(vary(rng, (200, 225, 245)))
    box(image, 0, 44, 64, 64, vary(rng, (150, 150, 150)))
    VEHICLES[vehicle](image, rng.randrange(23, 42), vary(rng, COLORS[color]))
    return Picture(image, f"{color} {vehicle}", {"color": color, "vehicle": vehicle})


def nuscenes(rng: Random) -> Drawing:
    """Six camera views; which camera sees a thing, or what does a camera see?"""
    colors = rng.sample(tuple(COLORS), 6)
    seen = {
        camera: (color, rng.choice(tuple(VEHICLES)))
        for camera, color in zip(CAMERAS, colors, strict=True)
    }
    pictures = {camera.capitalize(): _street(rng, *pair) for camera, pair in seen.items()}
    camera, names = rng.choice(CAMERAS), [" ".join(pair) for pair in seen.values()]
    name = " ".join(seen[camera])
    if rng.random() < 0.5:
        question = ask(rng, f"Which camera sees the {name}?", camera, CAMERAS)
    else:
        question = ask(rng, f"What does the {camera} see?", name, names)
    return compose("nuscenes", pictures, question)
