"""Drawing on uint8 arrays with analytic masks: the same pixels on every machine.

Integer arithmetic only, no font and no imaging library, so that no version of anything
changes a pixel; masks are cached, so that an image takes tens of microseconds.
"""

from __future__ import annotations

from functools import cache
from random import Random

import numpy as np
import numpy.typing as npt

IMAGE_SIZE = 64
"""Height and width of every image, pixels."""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (220, 25, 30),
    "green": (25, 155, 45),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 25),
    "purple": (140, 40, 170),
    "orange": (245, 125, 15),
    "teal": (0, 165, 165),
    "black": (15, 15, 15),
}
BACKGROUNDS: dict[str, Color] = {
    "white": (248, 248, 248),
    "gray": (160, 160, 160),
    "pink": (250, 195, 215),
    "cyan": (175, 235, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")

# Rows of a 5 x 7 pixel font, top first, the leftmost pixel in the highest of five bits.
_DIGIT_ROWS = {
    "0": (0x0E, 0x11, 0x13, 0x15, 0x19, 0x11, 0x0E),
    "1": (0x04, 0x0C, 0x04, 0x04, 0x04, 0x04, 0x0E),
    "2": (0x0E, 0x11, 0x01, 0x02, 0x04, 0x08, 0x1F),
    "3": (0x1F, 0x02, 0x04, 0x02, 0x01, 0x11, 0x0E),
    "4": (0x02, 0x06, 0x0A, 0x12, 0x1F, 0x02, 0x02),
    "5": (0x1F, 0x10, 0x1E, 0x01, 0x01, 0x11, 0x0E),
    "6": (0x06, 0x08, 0x10, 0x1E, 0x11, 0x11, 0x0E),
    "7": (0x1F, 0x01, 0x02, 0x04, 0x08, 0x08, 0x08),
    "8": (0x0E, 0x11, 0x11, 0x0E, 0x11, 0x11, 0x0E),
    "9": (0x0E, 0x11, 0x11, 0x0F, 0x01, 0x02, 0x0C),
}


def vary(rng: Random, color: Color, by: int = 10) -> Color:
    """Return the color with every channel moved by at most by levels."""
    red, green, blue = (min(255, max(0, c + rng.randrange(-by, by + 1))) for c in color)
    return red, green, blue


def blank(color: Color) -> Pixels:
    """Return a canvas of one color, uint8 of shape (64, 64, 3)."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    image[:] = color
    return image


def box(image: Pixels, left: int, top: int, right: int, bottom: int, color: Color) -> None:
    """Fill columns left..right-1 of rows top..bottom-1, as far as they lie on the canvas."""
    image[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = color


def paint(image: Pixels, mask: Mask, left: int, top: int, color: Color) -> None:
    """Color the pixels of a mask whose upper left corner lies at (left, top)."""
    x, y = max(0, left), max(0, top)
    target = image[y : max(0, top + mask.shape[0]), x : max(0, left + mask.shape[1])]
    height, width = target.shape[:2]
    target[mask[y - top : y - top + height, x - left : x - left + width]] = color


@cache
def shape_mask(shape: str, half: int) -> Mask:
    """Return a shape's mask of 2 * half + 1 pixels a side; shape is one of SHAPES."""
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    masks = {
        "circle": x * x + y * y <= half * half + half // 2,
        "square": (abs(x) <= half - 1) & (abs(y) <= half - 1),
        "triangle": 2 * abs(x) <= y + half,
        "cross": (3 * abs(x) <= half) | (3 * abs(y) <= half),
    }
    return np.asarray(masks[shape])


def draw_shape(image: Pixels, shape: str, half: int, x: int, y: int, color: Color) -> None:
    """Draw a shape around the centre (x, y)."""
    paint(image, shape_mask(shape, half), x - half, y - half, color)


@cache
def number_mask(digits: str, scale: int) -> Mask:
    """Return the mask of a number, digits 5 x 7 font pixels with one between them."""
    bits = [[[row >> (4 - x) & 1 for x in range(5)] for row in _DIGIT_ROWS[d]] for d in digits]
    gap = np.zeros((7, 1), np.int64)
    columns = [part for glyph in bits for part in (gap, np.array(glyph))][1:]
    return np.kron(np.hstack(columns), np.ones((scale, scale), np.int64)).astype(np.bool_)


def draw_number(image: Pixels, digits: str, scale: int, left: int, top: int, color: Color) -> None:
    """Write digits with their upper left corner at (left, top), scale pixels a font pixel."""
    paint(image, number_mask(digits, scale), left, top, color)


def place(x: int, y: int) -> str:
    """Name the cell of a 3 x 3 grid over the image in which (x, y) lies."""
    row = ("top", "middle", "bottom")[min(2, 3 * y // IMAGE_SIZE)]
    column = ("left", "center", "right")[min(2, 3 * x // IMAGE_SIZE)]
    return f"{row} {column}"
