"""MileBench's scores: which metric a task has, and what one answer earns.

The rules are those of the benchmark's official evaluation code, quirks included; `strict`,
`empty` and `unparsable` are this project's own and show what those quirks hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from kvbench.errors import UserError, brief
from kvbench.tasks.base import Sample, Score
from kvbench.tasks.milebench.choice import extract, label, strictly_right
from kvbench.tasks.milebench.normalise import normalise


class Metric(Enum):
    """How a task's answers are judged."""

    OPTION = "accuracy, option extracted"
    TOKEN = "accuracy, truth is a whole word of the answer"
    SUBSTRING = "accuracy, truth is part of the answer"
    ROUGE_L = "ROUGE-L F"


QUESTION_TYPES = {"multi-choice": Metric.OPTION, "open-ended": Metric.ROUGE_L}


def metric_of(folder: str, question_type: str) -> Metric:
    """The metric of a task: its folder's name first, then its question type.

    Raises:
        UserError: the question type is unknown.
    """
    if question_type not in QUESTION_TYPES:
        raise UserError(
            f"{folder}: question_type '{brief(question_type)}' is unknown; "
            f"use one of {', '.join(QUESTION_TYPES)}"
        )
    if "NeedleInAHaystack" in folder:
        return Metric.TOKEN
    if "MMCoQA" in folder:
        return Metric.SUBSTRING
    return QUESTION_TYPES[question_type]


def true_option(choices: Sequence[str], truth: str) -> int | None:
    """Index of the first option that equals the truth after normalisation, if there is one."""
    options = [normalise(choice) for choice in choices]
    wanted = normalise(truth)
    return options.index(wanted) if wanted in options else None


def _score_option(sample: Sample, answer: str) -> Score:
    choices, given = sample.choices or (), normalise(answer)
    right = true_option(choices, sample.truth)
    if right is None:
        raise UserError(
            f"sample {sample.sample_id}: the response '{brief(sample.truth)}' is not among its "
            f"{len(choices)} options; correct response or choice_list in the annotation file"
        )
    extracted = extract(given, [normalise(choice) for choice in choices])
    correct = extracted == label(right)
    labels = {label(index) for index in range(len(choices))}
    return Score(
        correct=correct,
        strict=strictly_right(answer, choices, right),
        empty=not given,
        unparsable=bool(given) and extracted not in labels,
        extracted=extracted,
        value=float(correct),
    )


def _score_words(sample: Sample, answer: str, metric: Metric) -> Score:
    truth, given = normalise(sample.truth), normalise(answer)
    correct = truth in (given.split() if metric is Metric.TOKEN else given)
    return _open_score(sample, answer, float(correct), correct)


def _score_rouge(sample: Sample, answer: str) -> Score:
    truth, given = normalise(sample.truth), normalise(answer)
    if not truth:
        raise UserError(
            f"sample {sample.sample_id}: the response is empty after normalisation, so ROUGE-L "
            f"is undefined; correct response in the annotation file"
        )
    value = _rouge_l(given, truth) if given else 0.0
    return _open_score(sample, answer, value, given == truth)


def _open_score(sample: Sample, answer: str, value: float, correct: bool) -> Score:
    given = answer.strip().casefold()
    normalised = normalise(answer)
    return Score(
        correct=correct,
        strict=bool(given) and given == sample.truth.strip().casefold(),
        empty=not normalised,
        unparsable=False,
        extracted=normalised,
        value=value,
    )


def _rouge_l(given: str, truth: str) -> float:
    """Summary-level ROUGE-L F of the package `rouge`; its ties decide, so no other will do."""
    try:
        from rouge import Rouge
    except ImportError as error:
        raise UserError(
            "open-ended tasks are scored by the package rouge, which is not installed; "
            "run: pip install 'kvbench[rouge]'"
        ) from error
    if not given.replace(".", "").strip():
        return 0.0  # The package finds no sentence in such a text and raises.
    return float(Rouge(metrics=["rouge-l"]).get_scores(given, truth)[0]["rouge-l"]["f"])


def score(sample: Sample, answer: str, folder: str) -> Score:
    """Scores one decoded answer to `sample` of the task in `folder`.

    For ROUGE-L, `value` is F and `correct` means equal to the truth after normalisation.

    Raises:
        UserError: the truth is not among the options, the question type is unknown, or ROUGE-L
            is asked for without the package `rouge`.
    """
    metric = metric_of(folder, sample.question_type)
    if metric is Metric.OPTION:
        return _score_option(sample, answer)
    if metric is Metric.ROUGE_L:
        return _score_rouge(sample, answer)
    return _score_words(sample, answer, metric)
