"""Pages with big numbers: web pages with a picture and a price, documents."""

from __future__ import annotations

from random import Random

from kvbench.tasks.minimile.canvas import (
    COLORS,
    SHAPES,
    Color,
    Pixels,
    blank,
    box,
    draw_number,
    draw_shape,
    vary,
)
from kvbench.tasks.minimile.drawing import Drawing, Picture, ask, compose, numbered

NUMBERS = tuple(str(number) for number in range(10, 100))
INK: tuple[Color, ...] = ((15, 15, 15), (20, 20, 90), (90, 20, 20))
PAPER: Color = (245, 245, 240)
LINE: Color = (200, 200, 200)


def _digit_facts(number: str) -> dict[str, str]:
    return {"number_tens": number[0], "number_units": number[1]}


def _lines(rng: Random, image: Pixels, rows: range) -> None:
    """Draw pale lines of unreadable text."""
    for top in rows:
        box(image, 5, top, rng.randrange(36, 60), top + 2, LINE)


def _web_page(rng: Random, color: str, shape: str, price: str) -> Picture:
    """Draw a page with a bar, a picture and a price below it."""
    image = blank(vary(rng, PAPER, 8))
    box(image, 0, 0, 64, 4, (90, 90, 100))
    half = rng.randrange(9, 12)
    draw_shape(image, shape, half, rng.randrange(13, 52), 18, vary(rng, COLORS[color]))
    draw_number(image, price, 4, rng.randrange(3, 17), rng.randrange(32, 35), rng.choice(INK))
    facts = {"color": color, "shape": shape} | _digit_facts(price)
    return Picture(image, f"{color} {shape}, {price}", facts)


def web_qa(rng: Random) -> Drawing:
    """Four pages; what is the price on the page with a picture, or on a numbered page?"""
    prices, colors = rng.sample(NUMBERS, 4), rng.sample(tuple(COLORS), 4)
    icons = [(color, rng.choice(SHAPES)) for color in colors]
    pictures = [_web_page(rng, *icon, price) for icon, price in zip(icons, prices, strict=True)]
    number = rng.randrange(4)
    if rng.random() < 0.6:
        text = f"What is the price on the page with the {' '.join(icons[number])}?"
    else:
        text = f"What is the price on page {number + 1}?"
    return compose("WebQA", numbered("Page", pictures), ask(rng, text, prices[number], prices))


def _document(rng: Random, number: str) -> Picture:
    """Draw a page with a big number between lines of text."""
    image = blank(vary(rng, PAPER, 8))
    top = rng.randrange(11, 19)
    _lines(rng, image, range(3, top - 3, 5))
    _lines(rng, image, range(top + 38, 62, 5))
    draw_number(image, number, 5, rng.randrange(2, 8), top, rng.choice(INK))
    return Picture(image, number, _digit_facts(number))


def doc_vqa(rng: Random) -> Drawing:
    """Eight pages; what number is written on one of them?"""
    numbers = rng.sample(NUMBERS, 8)
    pictures = [_document(rng, number) for number in numbers]
    page = rng.randrange(8)
    text = f"What number is written on page {page + 1}?"
    return compose("DocVQA", numbered("Page", pictures), ask(rng, text, numbers[page], numbers))
