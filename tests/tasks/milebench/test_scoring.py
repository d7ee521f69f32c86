from __future__ import annotations

import importlib.util
import sys

import pytest

from kvbench.errors import UserError
from kvbench.tasks.base import Sample, Score
from kvbench.tasks.milebench.scoring import Metric, metric_of, score, true_option

HAS_ROUGE = importlib.util.find_spec("rouge") is not None


def multiple(truth: str, *choices: str) -> Sample:
    return Sample(3, "", "", choices, truth, (), "Few")


def open_ended(truth: str) -> Sample:
    return Sample(3, "", "", None, truth, (), "Few", "open-ended")


@pytest.mark.parametrize(
    ("folder", "question_type", "metric"),
    [
        ("TQA", "multi-choice", Metric.OPTION),
        ("IEdit", "open-ended", Metric.ROUGE_L),
        ("TextNeedleInAHaystack", "open-ended", Metric.TOKEN),
        ("ImageNeedleInAHaystack", "multi-choice", Metric.TOKEN),
        ("MMCoQA", "open-ended", Metric.SUBSTRING),
        ("MultiModalQA", "multi-choice", Metric.OPTION),
    ],
)
def test_the_folder_decides_before_the_question_type(
    folder: str, question_type: str, metric: Metric
) -> None:
    assert metric_of(folder, question_type) is metric


def test_unknown_question_type_is_refused() -> None:
    with pytest.raises(
        UserError, match="question_type 'essay' is unknown; use one of multi-choice"
    ):
        metric_of("TQA", "essay")


def test_the_first_option_equal_to_the_truth_is_right() -> None:
    assert true_option(("cat", "Dog.", "dog"), "DOG") == 1
    assert true_option(("cat",), "dog") is None


def test_right_letter() -> None:
    assert score(multiple("no", "yes", "no"), " B.\n", "TQA") == Score(
        correct=True, strict=True, empty=False, unparsable=False, extracted="B", value=1.0
    )


def test_an_empty_answer_is_c_and_counts_as_empty() -> None:
    right = score(multiple("z", "x", "y", "z"), " \n", "TQA")
    assert right == Score(True, False, True, False, "C", 1.0)
    assert not score(multiple("x", "x", "y", "z"), " \n", "TQA").correct


def test_an_empty_answer_with_two_options_is_not_unparsable() -> None:
    assert score(multiple("x", "x", "y"), "", "TQA") == Score(False, False, True, False, "C", 0.0)


def test_several_letters_are_unparsable() -> None:
    assert score(multiple("y", "x", "y"), "The answer is B", "TQA") == Score(
        correct=False, strict=False, empty=False, unparsable=True, extracted="AB", value=0.0
    )


def test_no_letter_is_unparsable() -> None:
    result = score(multiple("y", "x", "y"), "777", "TQA")
    assert (result.extracted, result.unparsable) == ("", True)


def test_text_beats_letter_and_is_not_strict() -> None:
    result = score(multiple("two", "one", "two"), "A. two", "TQA")
    assert (result.correct, result.strict) == (True, False)


def test_the_later_of_two_equal_options_is_wrong() -> None:
    assert not score(multiple("dog", "dog", "dog"), "B", "TQA").correct


def test_truth_outside_the_options_is_refused() -> None:
    with pytest.raises(UserError, match="sample 3: the response 'w' is not among its 2 options"):
        score(multiple("w", "x", "y"), "A", "TQA")


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("It is 4821.", True), ("4821", True), ("48210", False), ("", False), ("4,821", True)],
)
def test_needle_must_be_a_whole_word(answer: str, correct: bool) -> None:
    result = score(open_ended("4821"), answer, "TextNeedleInAHaystack")
    assert (result.correct, result.value) == (correct, float(correct))


def test_mmcoqa_needs_a_substring() -> None:
    assert score(open_ended("rome"), "Jerome", "MMCoQA").correct
    assert not score(open_ended("rome"), "Paris", "MMCoQA").correct


def test_strict_for_words_is_the_whole_answer() -> None:
    assert score(open_ended("Rome"), " rome ", "MMCoQA").strict
    assert not score(open_ended("Rome"), "in Rome", "MMCoQA").strict
    assert not score(open_ended(""), "", "MMCoQA").strict


@pytest.mark.skipif(not HAS_ROUGE, reason="needs the package rouge")
@pytest.mark.parametrize(
    ("answer", "truth", "value"),
    [
        # F = 2PR / (P + R + 1e-8) over sets of words.
        ("take the hat away", "take the hat away", 2 / (2 + 1e-8)),
        ("take the the hat hat", "take the hat", 2 / (2 + 1e-8)),
        ("the hat", "take the hat away", 2 * 1.0 * 0.5 / (1.5 + 1e-8)),
        ("nothing here", "take hat", 0.0),
        ("", "take hat", 0.0),
        ("." * 40, "take hat", 0.0),
    ],
)
def test_rouge_l(answer: str, truth: str, value: float) -> None:
    assert score(open_ended(truth), answer, "IEdit").value == pytest.approx(value, abs=1e-12)


def test_rouge_l_needs_a_truth() -> None:
    with pytest.raises(UserError, match="sample 3: the response is empty after normalisation"):
        score(open_ended("?!"), "x", "IEdit")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(UserError, match="package rouge, which is not installed; run: pip install"):
        score(open_ended("x"), "x y", "IEdit")
