"""Figures of a textbook, a table with photos, and slides."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from kvbench.tasks.minimile.canvas import (
    COLORS,
    SHAPES,
    Color,
    blank,
    box,
    draw_number,
    draw_shape,
    vary,
)
from kvbench.tasks.minimile.drawing import Drawing, Picture, Question, ask, compose, numbered
from kvbench.tasks.minimile.frames import snapshot

LAYERS = {"top": "on top", "middle": "in the middle", "bottom": "at the bottom"}
BARS = ("left", "middle", "right")
DIGITS = tuple("123456789")
COUNTS = tuple("12345")
INK: Color = (15, 15, 15)
WHITE: Color = (250, 250, 250)
GRAY: Color = (170, 170, 170)


def _layers(rng: Random, colors: list[str]) -> Picture:
    """Draw a section through the ground: three layers of different colors."""
    image, top = blank(vary(rng, WHITE, 5)), rng.randrange(2, 8)
    bounds = [top, rng.randrange(20, 26), rng.randrange(38, 46), rng.randrange(60, 63)]
    for color, (upper, lower) in zip(colors, pairwise(bounds), strict=True):
        box(image, 4, upper, 60, lower, vary(rng, COLORS[color]))
    facts = {f"layer_{layer}": color for layer, color in zip(LAYERS, colors, strict=True)}
    return Picture(image, ", ".join(colors), facts)


def tqa(rng: Random) -> Drawing:
    """Four sections; which layer lies where in one of them?"""
    figures = [rng.sample(tuple(COLORS), 3) for _ in range(4)]
    pictures = [_layers(rng, colors) for colors in figures]
    number, layer = rng.randrange(4), rng.randrange(3)
    where = tuple(LAYERS.values())[layer]
    shown = figures[number]
    other = rng.choice([color for color in COLORS if color not in shown])
    text = f"In figure {number + 1}, which layer is {where}?"
    return compose(
        "TQA", numbered("Figure", pictures), ask(rng, text, shown[layer], [*shown, other])
    )


def _table(rng: Random, rows: list[tuple[str, str, str]]) -> Picture:
    """Draw a table of three rows: an object and its number."""
    image = blank(vary(rng, WHITE, 5))
    facts: dict[str, str] = {}
    box(image, 31, 0, 33, 64, GRAY)
    for row, (color, shape, digit) in enumerate(rows):
        box(image, 0, 21 * row - 1, 64, 21 * row + 1, GRAY)
        draw_shape(image, shape, 8, 16, 21 * row + 11, vary(rng, COLORS[color]))
        draw_number(image, digit, 2, 43, 21 * row + 4, INK)
        name = f"row{row + 1}"
        facts |= {f"{name}_color": color, f"{name}_shape": shape, f"{name}_digit": digit}
    return Picture(image, ", ".join(" ".join(row) for row in rows), facts)


def multi_modal_qa(rng: Random) -> Drawing:
    """A table and photos of its objects; which number has a photographed or a named object?"""
    colors, digits = rng.sample(tuple(COLORS), 3), rng.sample(DIGITS, 4)
    rows = [
        (color, rng.choice(SHAPES), digit) for color, digit in zip(colors, digits, strict=False)
    ]
    shots = rng.sample(rows, 3)
    pictures = {"Table": _table(rng, rows)}
    pictures |= numbered("Photo", [snapshot(rng, color, shape) for color, shape, _ in shots])
    number = rng.randrange(3)
    color, shape, digit = shots[number]
    name = f"object in photo {number + 1}" if rng.random() < 0.5 else f"{color} {shape}"
    question = ask(rng, f"Which number does the table give for the {name}?", digit, digits)
    return compose("MultiModalQA", pictures, question, tables=("Table",))


def _bullet_slide(rng: Random, title: str, count: int) -> Picture:
    """Draw a slide with a colored title bar and a list."""
    image = blank(vary(rng, WHITE, 5))
    box(image, 0, 0, 64, 14, vary(rng, COLORS[title]))
    for bullet in range(count):
        top = 18 + 9 * bullet
        box(image, 5, top, 11, top + 6, INK)
        box(image, 16, top + 1, rng.randrange(40, 60), top + 4, GRAY)
    noun = "bullet" if count == 1 else "bullets"
    facts = {"title_color": title, "bullets": str(count)}
    return Picture(image, f"{title} title, {count} {noun}", facts)


def _chart_slide(rng: Random, colors: list[str]) -> Picture:
    """Draw a slide with a chart of three bars, the tallest of them by far."""
    image = blank(vary(rng, WHITE, 5))
    heights = [rng.randrange(50, 59), rng.randrange(12, 34), rng.randrange(12, 34)]
    rng.shuffle(heights)
    for left, color, height in zip((4, 25, 46), colors, heights, strict=True):
        box(image, left, 62 - height, left + 14, 62, vary(rng, COLORS[color]))
    box(image, 0, 62, 64, 64, INK)
    tallest = colors[heights.index(max(heights))]
    facts = {f"{bar}_color": color for bar, color in zip(BARS, colors, strict=True)}
    caption = f"{', '.join(colors)}, tallest {tallest}"
    return Picture(image, caption, facts | {"tallest_color": tallest})


def _charts(rng: Random, number: int) -> tuple[list[Picture], Question]:
    """Six charts; which bar of one of them is the tallest?"""
    charts = [rng.sample(tuple(COLORS), 3) for _ in range(6)]
    pictures = [_chart_slide(rng, colors) for colors in charts]
    shown = charts[number]
    other = rng.choice([color for color in COLORS if color not in shown])
    text = f"Which bar is the tallest on slide {number + 1}?"
    answer = pictures[number].facts["tallest_color"]
    return pictures, ask(rng, text, answer, [*shown, other])


def _lists(rng: Random, number: int) -> tuple[list[Picture], Question]:
    """Six lists; how many bullets has the one of that number, or with that title?"""
    titles, counts = rng.sample(tuple(COLORS), 6), [rng.randrange(1, 6) for _ in range(6)]
    pictures = [_bullet_slide(rng, *pair) for pair in zip(titles, counts, strict=True)]
    by_title = rng.random() < 0.5
    slide = f"the slide with the {titles[number]} title" if by_title else f"slide {number + 1}"
    text = f"How many bullets does {slide} have?"
    return pictures, ask(rng, text, str(counts[number]), COUNTS)


def slide_vqa(rng: Random) -> Drawing:
    """Six slides, all charts or all lists, and a question about one of them."""
    number = rng.randrange(6)
    pictures, question = (_charts if rng.random() < 0.4 else _lists)(rng, number)
    return compose("SlideVQA", numbered("Slide", pictures), question)
