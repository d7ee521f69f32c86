"""Massive activations, the tokens that draw attention, and how well the ones find the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.analysis.attention import AttentionSummary
from kvbench.analysis.capture import LayerView
from kvbench.cache import EXACT, LayerQuantizer, Tokens

FEW = 15
"""Pivots of AKVQ-VL, and the "few tokens" that dominate attention in a pivot-salient layer."""
DOMINANT = 10.0
"""A token dominates when it gets this many times the mean token's attention."""
LEAST_QUERIES = 16
"""Far queries a token's attention must be averaged over to be measured at all."""
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
"""Sun et al. (arXiv 2402.17762): magnitude above 100 and 1,000 times the median."""


@dataclass(frozen=True)
class LayerPivots:
    """Activations and attention of one layer on one prompt; token lists hold positions.

    Attributes:
        magnitude: (T,) float32, largest |x| of each token in the residual stream at the input.
        median: Median of |x| over tokens and channels.
        massive: Tokens with massive activations, largest first.
        detected: Tokens that the detector picks, largest magnitude first.
        attention: (T,) share of all far attention that each token draws.
        dominant: Measured tokens that dominate attention, strongest first.
        precision: Share of detected (and measured) tokens that dominate; None without any.
        recall: Share of dominant tokens that were detected; None without any.
        overlap: Share of the `FEW` tokens with most attention that were detected.
        captured: Share of far attention that goes to detected tokens.
        few: Share of far attention that goes to the `FEW` tokens with most attention.
    """

    magnitude: Tensor
    median: float
    massive: list[int]
    detected: list[int]
    attention: Tensor
    dominant: list[int]
    precision: float | None
    recall: float | None
    overlap: float
    captured: float
    few: float


def pivots_of(
    view: LayerView, summary: AttentionSummary, is_vision: Tensor, detector: LayerQuantizer
) -> LayerPivots:
    """Compare what a method's plan keeps exact in a prompt with what its attention dwells on.

    Args:
        view: The layer.
        summary: Its attention.
        is_vision: (T,) bool.
        detector: A method's storage of this layer; the tokens to which its plan gives 16 bits are
            the detected ones.
    """
    stream = view.residual.float().abs()
    magnitude, median = stream.amax(1).cpu(), float(stream.median())
    detected = _by(magnitude, _kept_exact(view, is_vision, detector))
    massive = _by(magnitude, magnitude > max(MASSIVE, MASSIVE_RATIO * median))
    measured = summary.far_queries >= LEAST_QUERIES
    score = summary.far.masked_fill(~measured, 0.0)
    level = DOMINANT * score[measured].mean() if measured.any() else torch.inf
    dominant = _by(score, measured & (score > level))
    most = score.topk(min(FEW, int(measured.sum()))).indices.tolist()
    share = summary.far_mass / summary.far_mass.sum().clamp_min(1e-30)
    hits = len({*detected} & {*dominant})
    countable = int(measured[detected].sum())
    return LayerPivots(
        magnitude,
        median,
        massive,
        detected,
        share,
        dominant,
        hits / countable if countable else None,
        hits / len(dominant) if dominant else None,
        len({*most} & {*detected}) / max(len(most), 1),
        float(share[detected].sum()),
        float(share[most].sum()),
    )


def _kept_exact(view: LayerView, is_vision: Tensor, detector: LayerQuantizer) -> Tensor:
    """(T,) bool: tokens of 16 bits by the plan, windows left aside."""
    tokens = Tokens(
        torch.ones(1, len(is_vision), dtype=torch.bool),
        is_vision.cpu()[None],
        view.residual[None],
    )
    return detector.plan.prompt(tokens)[0].cpu() == EXACT


def _by(score: Tensor, chosen: Tensor) -> list[int]:
    """Positions of chosen tokens, highest score first."""
    places = chosen.nonzero().squeeze(1)
    return places[score[places].argsort(descending=True, stable=True)].tolist()
