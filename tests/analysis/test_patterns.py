"""Kinds of layers from made-up attention, and how sure they are."""

from __future__ import annotations

import math
from statistics import fmean

import pytest

from kvbench.analysis.patterns import PromptAttention, pattern_of, text_salient_layers
from kvbench.analysis.summary import geometric_mean, mean, mean_or_none

TEXT = PromptAttention([0.3, 0.2, 0.1], [0.1, 0.1, 0.2], 0.1)
VISION = PromptAttention([0.1, 0.1, 0.2], [0.3, 0.2, 0.1], 0.1)
FEW = PromptAttention([0.3, 0.2, 0.3], [0.1, 0.1, 0.2], 0.9)


def test_a_layer_that_favours_text() -> None:
    found = pattern_of([TEXT] * 7 + [VISION])
    assert found.favours_text
    assert not found.is_pivot_salient
    assert (found.prompts_favouring, found.prompts) == (7, 8)
    assert found.heads_favouring == pytest.approx((7 * 2 / 3 + 1 / 3) / 8)
    assert found.text is not None
    assert found.text.value == pytest.approx((7 * 0.2 + 0.4 / 3) / 8)
    logs = [math.log(3), math.log(2), math.log(0.5)]
    expected = math.exp((7 * fmean(logs) - fmean(logs)) / 8)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(expected)
    assert found.heads[0].ratio.value == pytest.approx(3 ** (6 / 8))


def test_sure_needs_prompts() -> None:
    assert pattern_of([TEXT] * 8).sure
    assert not pattern_of([TEXT]).sure
    assert not pattern_of([TEXT] * 4 + [VISION] * 3).sure
    assert pattern_of([FEW] * 3).sure
    assert not pattern_of([FEW, TEXT, FEW]).sure


def test_text_salient_layers_are_the_first_ones() -> None:
    text, vision, few = (pattern_of([one] * 5) for one in (TEXT, VISION, FEW))
    assert text_salient_layers([text, text, few, text]) == (0, 1)
    assert text_salient_layers([few, text]) == ()
    assert text_salient_layers([vision, text]) == ()
    assert text_salient_layers([text]) == (0,)


def test_no_images_no_text_salience() -> None:
    found = pattern_of([PromptAttention([], [], 0.2)] * 3)
    assert (found.ratio, found.text, found.heads, found.prompts) == (None, None, [], 0)
    assert text_salient_layers([found]) == ()
    assert not found.sure


def test_attention_of_zero_has_a_ratio() -> None:
    found = pattern_of([PromptAttention([0.1], [0.0], 0.1)] * 2)
    assert found.ratio is not None
    assert math.isfinite(found.ratio.value)


def test_means_and_intervals() -> None:
    values = [0.0, 1.0, 1.0, 0.5, 0.25, 0.0]
    found = mean(values)
    assert found.value == pytest.approx(fmean(values))
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low < found.value < found.high <= 1
    # Percentile bootstrap of six values: about 1.96 standard errors of the plain estimate.
    error = math.sqrt(fmean((v - found.value) ** 2 for v in values) / 6)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    assert mean([2.0]).low is None
    assert mean_or_none([None, 2.0]) == mean([2.0])
    assert mean_or_none([None]) is None
    assert geometric_mean([1.0, 4.0]).value == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one"):
        mean([])
