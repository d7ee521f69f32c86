"""Somebody who reads the words but sees no image does no better than chance."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import log, sqrt

import pytest

from kvbench.tasks.minimile import FOLDERS, draw, sample_rng

TRAINING, HELD_OUT = 900, 900


def features(drawing, option):
    """What the words tell about an option: its text, place, rank, and pairs with the question."""
    question = drawing.context.rsplit("Question: ", 1)[1]
    ranked = sorted(drawing.choices)
    yield ("text", option)
    yield ("place", drawing.choices.index(option))
    yield ("rank", ranked.index(option))
    yield ("question", question, option)
    for word in question.split():
        yield ("word", word, option)
        yield ("word and place", word, drawing.choices.index(option))
    for word in option.split():
        yield ("shares", word, sum(word in other.split() for other in drawing.choices))
        yield ("asked", word in question.split())
    for other in drawing.choices:
        yield ("beside", option, other)


def text_only_accuracy(drawn):
    """Fit naive Bayes on the first drawings; return its accuracy on the others."""
    seen, true = Counter(), Counter()
    for drawing in drawn[:TRAINING]:
        for option in drawing.choices:
            for feature in features(drawing, option):
                seen[feature] += 1
                true[feature] += option == drawing.answer

    def score(drawing, option):
        prior = 1 / len(drawing.choices)
        return sum(log((true[f] + 20 * prior) / (seen[f] + 20)) for f in features(drawing, option))

    right = sum(
        max(drawing.choices, key=lambda option, d=drawing: score(d, option)) == drawing.answer
        for drawing in drawn[TRAINING:]
    )
    return right / len(drawn[TRAINING:])


def draw_many(folder):
    total = TRAINING + HELD_OUT
    return [draw(folder, sample_rng("train", folder, 9, index)) for index in range(total)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_words_alone_do_not_tell_the_answer(folder):
    drawn = draw_many(folder)
    chance = 1 / len(drawn[0].choices)
    deviation = sqrt(chance * (1 - chance) / HELD_OUT)
    assert abs(text_only_accuracy(drawn) - chance) < 4 * deviation


def leak_by_frequency(drawing):
    """Whatever sorts first is right."""
    return replace(drawing, answer=min(drawing.choices))


def leak_by_question(drawing):
    """The question's page is hinted at by the option's first digit."""
    page = int(drawing.context.rsplit("page ", 1)[1].rstrip("?"))
    answer = f"{page}0"
    choices = tuple(answer if c == drawing.answer else c for c in drawing.choices)
    return replace(drawing, choices=choices, answer=answer)


@pytest.mark.parametrize("leak", [leak_by_frequency, leak_by_question])
def test_the_baseline_finds_leaks(leak):
    assert text_only_accuracy([leak(drawing) for drawing in draw_many("DocVQA")]) > 0.5
