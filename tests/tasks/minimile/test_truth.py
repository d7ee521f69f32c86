"""Every question is answered anew, from the facts of the images alone."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from kvbench.tasks.minimile import FOLDERS, draw, sample_rng

CAMERAS = [
    "front left camera",
    "front camera",
    "front right camera",
    "back left camera",
    "back camera",
    "back right camera",
]


def find(pattern, question):
    match = re.search(pattern, question)
    return match.groups() if match else None


def has(facts, name, second="shape"):
    return f"{facts['color']} {facts[second]}" == name


def existence(question, facts):
    (name,) = find(r"Is there a (\w+ \w+) in any image", question)
    return "yes" if any(has(image, name) for image in facts) else "no"


def interaction(question, facts):
    assert all(image["hand_color"] == image["hand_shape"] == "none" for image in facts[:-1])
    return f"{facts[-1]['hand_color']} {facts[-1]['hand_shape']}"


def moving(question, facts):
    (attribute,) = find(r"the (color|shape) of the moving", question)
    return facts[-1][f"moving_{attribute}"]


def navigation(question, facts):
    (color,) = find(r"the (\w+) door", question)
    (side,) = [key for key, value in facts[-1].items() if value == color]
    moves = {"left": "turn left", "ahead": "go forward", "right": "turn right", "near": "stop"}
    return moves[side.removeprefix("door_")]


def change(question, facts):
    keys = ("color", "shape", "background")
    differing = [key for key in keys if facts[0][key] != facts[-1][key]]
    assert len(differing) <= 1
    return differing[0] if differing else "nothing"


def transition(question, facts):
    scenes = [image["scene"] for image in facts]
    if named := find(r"in frame (\d)", question):
        return scenes[int(named[0]) - 1]
    (name,) = find(r"after the (\w+)", question)
    last = max(index for index, scene in enumerate(scenes) if scene == name)
    return scenes[last + 1]


def space(question, facts):
    seen = [f"{image['color']} {image['vehicle']}" for image in facts]
    if named := find(r"does the (.*) see", question):
        return seen[CAMERAS.index(named[0])]
    (name,) = find(r"sees the (\w+ \w+)", question)
    assert seen.count(name) == 1
    return CAMERAS[seen.index(name)]


def number(facts):
    return facts["number_tens"] + facts["number_units"]


def web(question, facts):
    if named := find(r"on page (\d)", question):
        return number(facts[int(named[0]) - 1])
    (name,) = find(r"with the (\w+ \w+)", question)
    (page,) = [image for image in facts if has(image, name)]
    return number(page)


def textbook(question, facts):
    figure, where = find(r"In figure (\d), which layer is (.*)\?", question)
    layer = {"on top": "top", "in the middle": "middle", "at the bottom": "bottom"}[where]
    return facts[int(figure) - 1][f"layer_{layer}"]


def table(question, facts):
    if named := find(r"object in photo (\d)", question):
        photo = facts[int(named[0])]  # the table comes first
        name = (photo["color"], photo["shape"])
    else:
        name = find(r"for the (\w+) (\w+)", question)
    rows = [tuple(facts[0][f"row{row}_{key}"] for key in ("color", "shape")) for row in (1, 2, 3)]
    return facts[0][f"row{rows.index(name) + 1}_digit"]


def slides(question, facts):
    if named := find(r"the (\w+) title", question):
        (slide,) = [image for image in facts if image["title_color"] == named[0]]
    else:
        slide = facts[int(find(r"slide (\d)", question)[0]) - 1]
    return slide["bullets" if "bullets" in question else "tallest_color"]


def document(question, facts):
    return number(facts[int(find(r"on page (\d)", question)[0]) - 1])


SOLVERS = {
    "ObjectExistence": existence,
    "ObjectInteraction": interaction,
    "MovingAttribute": moving,
    "EgocentricNavigation": navigation,
    "StateChange": change,
    "SceneTransition": transition,
    "nuscenes": space,
    "WebQA": web,
    "TQA": textbook,
    "MultiModalQA": table,
    "SlideVQA": slides,
    "DocVQA": document,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_images_facts_give_the_answer(folder):
    for index in range(300):
        drawing = draw(folder, sample_rng("train", folder, 1, index))
        question = drawing.context.rsplit("Question: ", 1)[1]
        assert SOLVERS[folder](question, drawing.facts) == drawing.answer, question


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_right_option_stands_equally_often_at_every_place(folder):
    drawn = [draw(folder, sample_rng("train", folder, 2, index)) for index in range(600)]
    options = len(drawn[0].choices)
    places = Counter(drawing.choices.index(drawing.answer) for drawing in drawn)
    expected = 600 / options
    spread = (expected * (1 - 1 / options)) ** 0.5
    assert all(abs(places[place] - expected) < 4 * spread for place in range(options))


def test_a_walk_is_one_that_can_be_walked():
    """From every view the walker turns to a door, or goes up to it; through it is a new room."""
    for index in range(100):
        rng = sample_rng("train", "EgocentricNavigation", 4, index)
        walk = [
            {key.removeprefix("door_"): value for key, value in facts.items() if value != "none"}
            for facts in draw("EgocentricNavigation", rng).facts
        ]
        for here, following in pairwise(walk):
            if "near" in here:
                assert "near" not in following
            elif "near" in following:
                assert here.get("ahead") == following["near"]
            else:
                assert following["ahead"] in (here.get("left"), here.get("right"))
