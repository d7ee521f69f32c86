"""Scene transition: a film of four scenes, two frames each."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvbench.tasks.minimile.canvas import Color, Pixels, blank, box, draw_shape, vary
from kvbench.tasks.minimile.drawing import Drawing, Picture, ask, compose, numbered

SAND: Color = (240, 210, 140)
SKY: Color = (150, 210, 250)
SUN: Color = (255, 225, 40)
WHITE: Color = (252, 252, 252)
TRUNK: Color = (110, 70, 30)


def _beach(rng: Random) -> Pixels:
    """A yellow beach below a blue sky, with a red parasol."""
    image, x = blank(vary(rng, SKY)), rng.randrange(14, 50)
    box(image, 0, 36, 64, 64, vary(rng, SAND))
    box(image, x - 1, 30, x + 1, 58, TRUNK)
    draw_shape(image, "triangle", 12, x, 28, (230, 40, 50))
    return image


def _forest(rng: Random) -> Pixels:
    """Dark green firs with brown trunks on green ground."""
    image = blank(vary(rng, (170, 215, 170)))
    box(image, 0, 48, 64, 64, vary(rng, (60, 120, 50)))
    for column in (9, 32, 55):
        x = column + rng.randrange(-4, 5)
        box(image, x - 2, 44, x + 3, 58, TRUNK)
        draw_shape(image, "triangle", 13, x, 30 + rng.randrange(-3, 4), (15, 85, 30))
    return image


def _city(rng: Random) -> Pixels:
    """Gray towers with lit windows."""
    image = blank(vary(rng, (190, 200, 215)))
    for left in (2, 23, 44):
        top = rng.randrange(6, 26)
        box(image, left, top, left + 18, 64, vary(rng, (85, 85, 95)))
        for y in range(top + 4, 62, 9):
            box(image, left + 4, y, left + 7, y + 4, SUN)
            box(image, left + 11, y, left + 14, y + 4, SUN)
    return image


def _desert(rng: Random) -> Pixels:
    """Orange dunes with a green cactus."""
    image, x = blank(vary(rng, (255, 225, 180))), rng.randrange(16, 48)
    box(image, 0, 32, 64, 64, vary(rng, (225, 140, 50)))
    green = (30, 130, 50)
    box(image, x - 3, 18, x + 4, 56, green)
    box(image, x - 12, 34, x + 13, 39, green)
    box(image, x - 12, 24, x - 7, 36, green)
    box(image, x + 8, 22, x + 13, 36, green)
    return image


def _snow(rng: Random) -> Pixels:
    """A snowman on white ground below a pale sky."""
    image, x = blank(vary(rng, (165, 185, 205))), rng.randrange(16, 48)
    box(image, 0, 46, 64, 64, WHITE)
    for half, y in ((12, 46), (9, 28)):
        draw_shape(image, "circle", half, x, y, WHITE)
    box(image, x - 7, 12, x + 8, 20, (20, 20, 20))
    box(image, x - 11, 19, x + 12, 22, (20, 20, 20))
    return image


def _night(rng: Random) -> Pixels:
    """A yellow moon and white stars in a dark sky."""
    image = blank(vary(rng, (15, 15, 55)))
    for _ in range(9):
        x, y = rng.randrange(2, 60), rng.randrange(2, 60)
        box(image, x, y, x + 2, y + 2, WHITE)
    draw_shape(image, "circle", 11, rng.randrange(14, 50), rng.randrange(14, 40), (250, 235, 150))
    return image


def _sea(rng: Random) -> Pixels:
    """A boat with a white sail on deep blue water."""
    image, x = blank(vary(rng, SKY)), rng.randrange(16, 48)
    box(image, 0, 40, 64, 64, vary(rng, (20, 70, 170)))
    draw_shape(image, "triangle", 12, x, 22, WHITE)
    box(image, x - 14, 36, x + 15, 44, (150, 40, 30))
    return image


def _room(rng: Random) -> Pixels:
    """A room with a window, a wooden floor and a purple sofa."""
    image, x = blank(vary(rng, (245, 220, 205))), rng.randrange(20, 44)
    box(image, 0, 50, 64, 64, vary(rng, (150, 95, 50)))
    box(image, x - 8, 6, x + 9, 22, WHITE)
    box(image, x - 6, 8, x + 7, 20, SKY)
    box(image, x - 16, 30, x + 17, 44, (130, 50, 140))
    box(image, x - 20, 38, x + 21, 54, (110, 35, 120))
    return image


SCENES: dict[str, Callable[[Random], Pixels]] = {
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "snow": _snow,
    "night": _night,
    "sea": _sea,
    "room": _room,
}


def scene_transition(rng: Random) -> Drawing:
    """Eight frames, four scenes; which comes right after a named one, or in a numbered frame?"""
    order = rng.sample(tuple(SCENES), 5)  # the fifth is an option and in no frame
    frames = [name for name in order[:4] for _ in range(2)]
    pictures = [Picture(SCENES[name](rng), name, {"scene": name}) for name in frames]
    if rng.random() < 0.6:
        place = rng.randrange(3)
        text = f"Which scene comes right after the {order[place]}?"
        answer, asked = order[place + 1], order[place]
        others = [name for name in order if name != asked]
    else:
        number = rng.randrange(8)
        text, answer = f"Which scene is shown in frame {number + 1}?", frames[number]
        others = order[:4]
    return compose("SceneTransition", numbered("Frame", pictures), ask(rng, text, answer, others))
