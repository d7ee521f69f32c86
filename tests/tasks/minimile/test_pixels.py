"""What the facts say is to be seen in the pixels, judged without the drawing code."""

from __future__ import annotations

import numpy as np
import pytest

from kvbench.tasks.minimile import draw, sample_rng

RGB = {
    "red": (220, 25, 30),
    "green": (25, 155, 45),
    "blue": (30, 60, 220),
    "yellow": (245, 220, 25),
    "purple": (140, 40, 170),
    "orange": (245, 125, 15),
    "teal": (0, 165, 165),
    "black": (15, 15, 15),
}
GROUND = {"white": (248,) * 3, "gray": (160,) * 3, "pink": (250, 195, 215), "cyan": (175, 235, 250)}
SEVEN_SEGMENT_FREE = {
    "1": "..#..  .##..  ..#..  ..#..  ..#..  ..#..  .###.",
    "4": "...#.  ..##.  .#.#.  #..#.  #####  ...#.  ...#.",
    "7": "#####  ....#  ...#.  ..#..  .#...  .#...  .#...",
}


def near(image, color, tolerance=10):
    return (np.abs(image.astype(int) - color) <= tolerance).all(-1)


def pictures(folder, count=80):
    for index in range(count):
        drawing = draw(folder, sample_rng("train", folder, 5, index))
        yield from zip(drawing.images, drawing.facts, strict=True)


def test_an_object_has_its_color_on_its_background_at_its_place():
    rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
    for image, facts in pictures("ObjectExistence"):
        ys, xs = np.nonzero(near(image, RGB[facts["color"]]))
        assert len(ys) > 100
        assert near(image, GROUND[facts["background"]]).sum() > 2000
        y, x = (ys.min() + ys.max()) // 2, (xs.min() + xs.max()) // 2
        assert facts["place"] == f"{rows[y * 3 // 64]} {columns[x * 3 // 64]}"


def test_shapes_differ_in_how_they_fill_their_box():
    fills = {"square": 1.0, "circle": np.pi / 4, "triangle": 0.5, "cross": 5 / 9}
    for image, facts in pictures("ObjectExistence"):
        mask = near(image, RGB[facts["color"]])
        ys, xs = np.nonzero(mask)
        box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert box.mean() == pytest.approx(fills[facts["shape"]], abs=0.08)
        top, middle = box[1].mean(), box[len(box) // 2].mean()
        assert (top < 0.2) == (facts["shape"] == "triangle")
        assert (middle > 0.95) == (facts["shape"] != "triangle")


def test_layers_lie_in_the_order_of_the_facts():
    for image, facts in pictures("TQA"):
        for layer, row in (("top", 13), ("middle", 32), ("bottom", 53)):
            assert near(image[row, 4:60], RGB[facts[f"layer_{layer}"]]).all()


def test_the_tallest_bar_is_the_tallest():
    charts = [(i, f) for i, f in pictures("SlideVQA") if "tallest_color" in f]
    assert charts
    for image, facts in charts:
        heights = {
            facts[f"{side}_color"]: near(image[:62, column], RGB[facts[f"{side}_color"]]).sum()
            for side, column in (("left", 10), ("middle", 31), ("right", 52))
        }
        assert max(heights, key=heights.get) == facts["tallest_color"]


def test_bullets_can_be_counted():
    lists = [(i, f) for i, f in pictures("SlideVQA") if "bullets" in f]
    assert lists
    for image, facts in lists:
        column = near(image[15:, 7], (15, 15, 15), 0).astype(int)
        assert (np.diff(column) == 1).sum() == int(facts["bullets"])


def test_the_hand_encloses_what_it_takes():
    centres = {"left": 11, "middle": 32, "right": 53}
    for image, facts in pictures("ObjectInteraction"):
        fingers = (image[55] == 0).all(-1)
        if facts["hand_color"] == "none":
            assert not fingers.any()
            continue
        (side,) = [s for s in centres if facts[f"{s}_color"] == facts["hand_color"]]
        assert fingers[centres[side] - 10 : centres[side]].any()
        assert fingers[centres[side] + 1 : centres[side] + 11].any()
        assert fingers.sum() == 6


@pytest.mark.parametrize("digit", SEVEN_SEGMENT_FREE)
def test_digits_are_written_as_one_writes_them(digit):
    want = np.array([[c == "#" for c in row] for row in SEVEN_SEGMENT_FREE[digit].split()])
    found = 0
    for image, facts in pictures("DocVQA"):
        if facts["number_tens"] != digit:
            continue
        ink = image.max(-1) < 120
        ys, xs = np.nonzero(ink)
        left = xs.min() - (5 if digit == "1" else 0)  # the "1" has an empty first column
        shown = ink[ys.min() : ys.max() + 1 : 5, left : left + 25 : 5]
        np.testing.assert_array_equal(shown, want)
        found += 1
    assert found > 20
