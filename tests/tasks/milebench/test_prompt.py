from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.tasks.base import Prompt, Sample
from kvbench.tasks.milebench.prompt import build_prompt, full_text, newline_rule, place_markers

M = "<ImageHere>"


class Words:
    """One token a word, its leading blank included: joined again they are the text."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        pieces = text.replace(" ", "\0 ").split("\0") if text else []
        for piece in pieces:
            if piece not in self.known:
                self.known.append(piece)
        return [self.known.index(piece) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.known[index] for index in ids)


class TidyWords(Words):
    """Decoding drops the blank before a comma, as some tokenizers' clean-up does."""

    def decode(self, ids: list[int]) -> str:
        return super().decode(ids).replace(" ,", ",")


def sample(context: str, images: int, choices: tuple[str, ...] | None = None) -> Sample:
    paths = tuple(Path(f"/{k}.png") for k in range(1, images + 1))
    return Sample(7, "Look well.", context, choices, "x", paths, "Few")


def build(
    context: str, images: int, limit: int = 1000, per_image: int = 10, words: Words | None = None
) -> Prompt:
    return build_prompt(sample(context, images), words or Words(), limit, per_image)


def names(prompt: Prompt) -> list[str]:
    return [path.stem for path in prompt.images]


def test_options_follow_the_context_with_their_trailing_blanks() -> None:
    assert full_text("Why?", ("red", "light blue")) == (
        "Why?\nChoice list: \nA. red\nB. light blue\nYour answer is: "
    )


def test_open_ended_text_gets_no_suffix() -> None:
    assert full_text("Why?", None) == "Why?"


def test_letters_run_past_z_by_code_point() -> None:
    lines = full_text("", tuple("x" * 28)).split("\n")
    assert lines[27:30] == ["Z. x", "[. x", "\\. x"]


def test_options_without_letters() -> None:
    assert full_text("Q", ("a b", "c"), lettered=False) == (
        "Q\nChoice list: \na b\nc\nYour answer is: "
    )


def test_images_and_tables_share_one_numbering_and_unknown_ones_stay() -> None:
    assert place_markers("{table#1} {image#2} {image#3} {i} {image#0}", 2) == (
        f"{M} {M} {{image#3}} {{i}} {{image#0}}"
    )


def test_placeholders_inside_options_become_markers() -> None:
    prompt = build_prompt(sample("{image#1}Q", 2, ("{image#2}", "no")), Words(), 1000, 10)
    assert prompt.text == (f"Look well.\n{M}Q\nChoice list: \nA. {M}\nB. no\nYour answer is: ")
    assert names(prompt) == ["1", "2"]


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        (1, M),
        (2, f"{M}\n{M}\n"),
        (3, f"{M}\n{M}\n{M}"),
        (4, f"{M}\n{M}\n{M}\n{M}\n"),
        (5, f"{M}\n{M}\n{M}\n{M}\n{M}"),
    ],
)
def test_newline_rule_leaves_the_last_of_an_odd_run(markers: int, expected: str) -> None:
    assert newline_rule("a " + M * markers + " b") == "a " + expected + " b"


def test_newline_rule_needs_adjacent_markers() -> None:
    assert newline_rule(f"{M} {M}") == f"{M} {M}"


def test_everything_fits() -> None:
    prompt = build("{image#1}{image#2}Which one is red?", 2)
    assert prompt.text == f"Look well.\n{M}{M}Which one is red?"
    assert names(prompt) == ["1", "2"]
    assert (prompt.images_total, prompt.truncated) == (2, False)


# Instruction 2 tokens, question 4, images 10: one image needs 16, two need 26.
@pytest.mark.parametrize(("limit", "kept"), [(26, ["1", "2"]), (25, ["2"]), (16, ["2"]), (15, [])])
def test_a_fit_is_inclusive_and_the_first_images_go_first(limit: int, kept: list[str]) -> None:
    prompt = build("{image#1}{image#2}Which one is red?", 2, limit)
    assert prompt.text == "Look well.\n" + M * len(kept) + "Which one is red?"
    assert names(prompt) == kept
    assert prompt.truncated == (len(kept) < 2)


def test_the_last_fragment_is_cut_from_the_left_and_then_no_image_is_kept() -> None:
    prompt = build("{image#1}Which one is red?", 1, limit=4, per_image=1)
    assert prompt.text == "Look well.\n is red?"
    assert (names(prompt), prompt.truncated) == ([], True)


def test_an_earlier_fragment_that_does_not_fit_is_dropped_whole() -> None:
    # 2 + 2 (question) + 10 leave 3 of 17 tokens; the four words before the image don't fit.
    prompt = build("one two three four {image#1}say it", 1, limit=17)
    assert prompt.text == f"Look well.\n{M}say it"
    assert (names(prompt), prompt.truncated) == (["1"], True)


def test_an_earlier_fragment_that_just_fits_stays() -> None:
    prompt = build("one two three{image#1}say it", 1, limit=17)
    assert prompt.text == f"Look well.\none two three{M}say it"
    assert not prompt.truncated


def test_placeholder_numbers_out_of_order_change_nothing() -> None:
    prompt = build("{image#2} then {image#1} end", 2)
    assert prompt.text == f"Look well.\n{M} then {M} end"
    assert names(prompt) == ["1", "2"]


def test_fewer_placeholders_than_images_align_from_the_end_with_one_image_in_front() -> None:
    prompt = build("see {image#1} end", 3)
    assert prompt.text == f"Look well.\n{M}see {M} end"
    assert names(prompt) == ["2", "3"]
    assert (prompt.images_total, prompt.truncated) == (3, False)


def test_no_placeholder_at_all_puts_the_last_image_in_front() -> None:
    prompt = build("end", 2)
    assert prompt.text == f"Look well.\n{M}end"
    assert names(prompt) == ["2"]


def test_text_is_decoded_from_its_own_tokens_but_the_instruction_is_not() -> None:
    item = Sample(0, "Well , look.", "a , b{image#1}c , d", None, "x", (Path("/1.png"),), "Few")
    prompt = build_prompt(item, TidyWords(), 1000, 10)
    assert prompt.text == f"Well , look.\na, b{M}c, d"


# 7 images of 576 tokens leave 64 of 4096 for instruction and text, 6 leave 640.
@pytest.mark.parametrize(("words", "kept"), [(62, 7), (63, 6), (638, 6), (639, 5)])
def test_images_that_a_context_of_4096_keeps(words: int, kept: int) -> None:
    places = "".join(f"{{image#{k}}}" for k in range(1, 10))
    prompt = build(places + " ".join("w" * words), 9, 4096, 576)
    assert names(prompt) == [str(k) for k in range(10 - kept, 10)]


def test_an_instruction_that_fills_the_context_is_refused() -> None:
    with pytest.raises(UserError, match=r"sample 7: the instruction alone has 2 tokens"):
        build("Which?", 1, limit=2)


def straightforward(
    fragments: list[int], images: int, budget: int, per_image: int
) -> tuple[list[int], int, bool]:
    """Kept fragment lengths, number of kept images and whether an image comes first.

    Written as a sequence of things from the end, text and image in turn, taken while they fit.
    """
    things: list[tuple[str, int]] = []
    for length in reversed(fragments):
        things += [("text", length), ("image", per_image)]
    texts, pictures, first, used = [], 0, False, 0
    for position, (kind, cost) in enumerate(things):
        if used + cost > budget:
            if position == 0:
                texts = [min(cost, budget)]
            break
        if kind == "text":
            texts.insert(0, cost)
            first = False
        elif pictures < images:
            pictures += 1
            first = True
        else:
            continue
        used += cost
    return texts, pictures, first


def test_truncation_agrees_with_a_second_implementation() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        lengths = [rng.randint(0, 5) for _ in range(rng.randint(1, 6))]
        images = rng.randint(max(1, len(lengths) - 1), 6)
        limit, per_image = rng.randint(3, 40), rng.randint(1, 8)
        places = [f"{{image#{k}}}" for k in range(1, len(lengths))]
        pieces = [
            "".join(f" w{index}{n}" for n in range(size)) for index, size in enumerate(lengths)
        ]
        context = pieces[0] + "".join(p + t for p, t in zip(places, pieces[1:], strict=True))
        prompt = build(context, images, limit, per_image, TokenPerBlank())
        texts, pictures, first = straightforward(lengths, images, limit - 2, per_image)
        tail = pieces[len(pieces) - len(texts) :]
        tail[0] = "".join(" " + word for word in tail[0].split()[len(tail[0].split()) - texts[0] :])
        assert prompt.text == "Look well.\n" + M * first + M.join(tail)
        assert names(prompt) == [str(k) for k in range(images - pictures + 1, images + 1)]


class TokenPerBlank(Words):
    """Like Words, but a text that begins with a blank has no empty first token."""

    def encode(self, text: str) -> list[int]:
        return [index for index in super().encode(text) if self.known[index]]
