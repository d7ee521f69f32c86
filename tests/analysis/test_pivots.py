"""Detector and attention held against each other on prompts where the answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench.analysis.attention import AttentionSummary
from kvbench.analysis.pivots import pivots_of
from kvbench.registry import METHODS, configured

TOKENS = 80


def summary_with(shares: dict[int, float]) -> AttentionSummary:
    """Every token but these gets little attention."""
    far = torch.full((TOKENS,), 0.001, dtype=torch.float64)
    for token, share in shares.items():
        far[token] = share
    queries = (TOKENS - torch.arange(TOKENS) - 4).clamp_min(0)
    none = torch.zeros(4, dtype=torch.float64)
    return AttentionSummary(far, far, far * queries, queries, none, none, 1, torch.zeros(1, 1))


def residual_with(peaks: dict[int, float]) -> torch.Tensor:
    residual = torch.full((TOKENS, 12), 0.05)
    for token, peak in peaks.items():
        residual[token, 3] = -peak
    return residual


@pytest.fixture
def detector(make_view: Any) -> Any:
    """AKVQ-VL with three pivots in every layer."""
    method: Any = configured(METHODS.get("akvq_vl"), {"pivots": "3", "pivot_layers": "all"})
    return method.layer(make_view(TOKENS).spec, None)


def test_precision_and_recall(make_view: Any, detector: Any) -> None:
    peaks = {0: 900.0, 30: 200.0, 41: 60.0}
    view = make_view(TOKENS, residual=residual_with(peaks))
    summary = summary_with({0: 0.4, 30: 0.25, 20: 0.28, 25: 0.3})
    found = pivots_of(view, summary, torch.zeros(TOKENS).bool(), detector)
    assert found.detected == [0, 30, 41]
    assert found.massive == [0, 30]  # 41 is large, but not above 100
    assert found.dominant == [0, 25, 20, 30]
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 4)
    mass = {0: 0.4 * 76, 30: 0.25 * 46, 20: 0.28 * 56, 25: 0.3 * 51}
    rest = sum(0.001 * max(76 - t, 0) for t in range(TOKENS) if t not in mass)
    total = sum(mass.values()) + rest
    captured = (mass[0] + mass[30] + 0.001 * 35) / total
    assert found.captured == pytest.approx(captured, rel=1e-5)
    assert found.few > found.captured
    assert found.median == pytest.approx(0.05)


def test_recent_tokens_are_not_held_against_the_detector(make_view: Any, detector: Any) -> None:
    """Too few queries see them from afar; the window keeps them exact anyway."""
    view = make_view(TOKENS, residual=residual_with({0: 900.0, 70: 300.0, 75: 250.0}))
    found = pivots_of(view, summary_with({0: 0.5}), torch.zeros(TOKENS).bool(), detector)
    assert found.detected == [0, 70, 75]
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_even_attention_has_no_dominant_token(make_view: Any, detector: Any) -> None:
    view = make_view(TOKENS, residual=residual_with({5: 900.0}))
    found = pivots_of(view, summary_with({}), torch.zeros(TOKENS).bool(), detector)
    assert found.recall is None
    assert found.precision == 0.0


def test_short_prompts_measure_nothing(make_view: Any, detector: Any) -> None:
    view = make_view(8, residual=residual_with({})[:8])
    empty = torch.zeros(8, dtype=torch.float64)
    summary = AttentionSummary(
        empty, empty, empty, empty.long(), empty[:4], empty[:4], 0, torch.zeros(1, 1)
    )
    found = pivots_of(view, summary, torch.zeros(8).bool(), detector)
    assert found.dominant == []
    assert (found.precision, found.recall, found.overlap, found.few) == (None, None, 0.0, 0.0)
