from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.tasks.milebench.choice import extract, label, strictly_right
from kvbench.tasks.milebench.normalise import normalise

COLOURS = ("red", "green", "blue", "pink")


def read(answer: str, choices: tuple[str, ...] = COLOURS) -> str:
    return extract(normalise(answer), [normalise(choice) for choice in choices])


@pytest.mark.parametrize(
    ("index", "expected"),
    [(0, "A"), (25, "Z"), (26, "AA"), (27, "AB"), (51, "AZ"), (52, "BA"), (77, "BZ"), (78, "CA")],
)
def test_labels(index: int, expected: str) -> None:
    assert label(index) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # Nothing left means C, whatever it was.
        ("", "C"),
        (" \n\t", "C"),
        ("?!", "C"),
        (".", "C"),
        # A bare label.
        ("B", "B"),
        ("b.", "B"),
        ("(D)", "D"),
        ("E", ""),
        # Label and text, text alone, text against letter.
        ("B. green", "B"),
        ("The colour is green.", "B"),
        ("A. green", "B"),
        ("red, then blue", "A"),
        ("blue, then red", "C"),
        ("gr een", "B"),
        ("GREEN", "B"),
        # Letters of the carrier phrase count.
        ("The answer is B", "AB"),
        ("Answer: A", "AA"),
        ("Option B", "B"),
        ("There is 3", ""),
        ("There are 3", "A"),
        ("B C", "BC"),
        ("xyz", ""),
        # An article before the first option's text looks like its label.
        ("not green but a red one", "A"),
    ],
)
def test_vectors(answer: str, expected: str) -> None:
    assert read(answer) == expected


@pytest.mark.parametrize(
    ("choices", "answer", "expected"),
    [
        (("yes", "no"), "it cannot", "B"),
        (("1", "10"), "10", "A"),
        (("10", "1"), "10", "A"),
        # A decimal point or "$" forbids matching by text alone.
        (("3.5", "4.5"), "4.5", ""),
        (("3.5", "4.5"), "B. 4.5", "B"),
        (("$5", "$7"), "$7", ""),
        (("$5", "$7"), "b $7", "B"),
        (("3.5", "cat"), "3.5 cats", "A"),
        (("a*b", "x"), "a*b", "AB"),
        # The later of two equal options can't win by text.
        (("dog", "dog"), "dog", "A"),
        (("dog", "dog"), "B. dog", "B"),
        # An option that normalises to nothing is found in every answer.
        (("?", "red"), "red", "A"),
        (("red", "?"), "zzz", "B"),
        # The texts of these two normalise differently.
        (("well-known", "1,000 well-known"), "well known", "A"),
        (("well-known", "1,000 well-known"), "1000 wellknown", "B"),
        # Blanks are not collapsed but deleted when texts are compared.
        (("A / B", "C"), "a b", "A"),
    ],
)
def test_vectors_with_other_options(choices: tuple[str, ...], answer: str, expected: str) -> None:
    assert read(answer, choices) == expected


def test_two_letter_labels() -> None:
    choices = tuple(f"t{chr(97 + index // 6)}{chr(97 + index % 6)}" for index in range(28))
    assert read("AB", choices) == "AB"
    assert read("AC", choices) == "AC"
    # With the text behind it only the first letter comes out.
    assert read("AA. " + choices[26], choices) == "A"
    assert read(choices[26], choices) == "AA"


def second_implementation(answer: str, options: list[str]) -> str:
    """The rules by regular expressions instead of searching and comparing."""
    if answer == "":
        return "C"
    letters = [chr(65 + index) for index in range(len(options))]
    named = [re.escape(normalise(f"{a} {b}")) for a, b in zip(letters, options, strict=True)]
    if hit := re.search("|".join(named), answer):
        return hit[0][0].upper()
    bare = [normalise(option).replace(" ", "") for option in options]
    hit = re.search("|".join(map(re.escape, bare)), answer.replace(" ", ""))
    if hit and not re.search(r"[.^$*|]", hit[0]):
        return letters[bare.index(hit[0])]
    if len(answer) < 3 and answer.upper() in letters:
        return answer.upper()
    return "".join(character.upper() for character in answer if character.upper() in letters)


TEXTS = st.text(alphabet="aAbBcd 1.,$-'", max_size=6)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=6))
def test_agrees_with_a_second_implementation(answer: str, choices: list[str]) -> None:
    options = [normalise(choice) for choice in choices]
    given_ = normalise(answer)
    assert extract(given_, options) == second_implementation(given_, options)


@given(st.integers(0, 5), st.lists(TEXTS, min_size=6, max_size=6), st.sampled_from(["", ". ", " "]))
def test_agrees_on_answers_that_name_an_option(
    index: int, choices: list[str], between: str
) -> None:
    options = [normalise(choice) for choice in choices]
    given_ = normalise("ABCDEF"[index] + between + choices[index])
    assert extract(given_, options) == second_implementation(given_, options)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        (" b \n", True),
        ("B.", True),
        ("b)", True),
        ("B:", True),
        ("B. green", True),
        ("B) GREEN", True),
        ("b:green", True),
        ("Green", True),
        ("", False),
        ("  ", False),
        ("A", False),
        ("B green", False),
        ("B. red", False),
        ("B. green.", False),
        ("green.", False),
        ("(B)", False),
        ("The answer is B", False),
        ("B B", False),
        ("greenish", False),
        ("B, green", False),
    ],
)
def test_strict(answer: str, right: bool) -> None:
    assert strictly_right(answer, COLOURS, 1) is right


def test_strict_with_a_two_letter_label() -> None:
    choices = tuple(f"t{index}" for index in range(28))
    assert strictly_right("AB) t27", choices, 27)
    assert not strictly_right("A", choices, 26)
