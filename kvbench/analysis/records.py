"""What is kept of one prompt: every layer's attention, pivots, channels and errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvbench.analysis.attention import AttentionSummary, summarise
from kvbench.analysis.capture import LayerView, watch
from kvbench.analysis.errors import LayerError, layer_error
from kvbench.analysis.influence import Influence, influences, prompt_influences
from kvbench.analysis.outliers import ChannelMagnitudes, magnitudes
from kvbench.analysis.pivots import LayerPivots, pivots_of

if TYPE_CHECKING:
    from kvbench.cache import BoundMethod
    from kvbench.models.inputs import ModelInputs

GRID = 48
"""Bins of a map of attention along each axis, at most."""


@dataclass
class PromptRecord:
    """Lists have one entry a layer; dictionaries are by a method's spec.

    Attributes:
        is_vision: (T,) bool.
        bin_size: Tokens of a bin of the attention maps.
    """

    is_vision: Tensor
    bin_size: int
    attention: list[AttentionSummary] = field(default_factory=list)
    pivots: list[LayerPivots] = field(default_factory=list)
    channels: list[dict[str, ChannelMagnitudes]] = field(default_factory=list)
    errors: dict[str, list[LayerError]] = field(default_factory=dict)
    influences: dict[str, list[Influence]] = field(default_factory=dict)
    """Under exact_prefill."""
    prompt_influences: dict[str, list[Influence]] = field(default_factory=dict)
    """Under quantized_prefill; empty where it was not asked for."""


def record(
    inputs: ModelInputs,
    methods: Mapping[str, BoundMethod],
    detector: BoundMethod,
    near: int,
    whole: bool,
) -> PromptRecord:
    """Run one prompt and take down everything about it.

    Args:
        inputs: The prompt.
        methods: Methods by spec, bound to the model.
        detector: Method that picks pivots.
        near: See `summarise`.
        whole: Whether to run the model once more for each layer and method.
    """
    is_vision = inputs.is_vision[0].cpu()
    tokens = len(is_vision)
    size = -(-tokens // GRID)
    bins = torch.arange(tokens) // size
    kept = PromptRecord(is_vision, size, errors={spec: [] for spec in methods})

    def visit(view: LayerView) -> None:
        summary = summarise(view, is_vision, bins, near=near)
        kept.attention.append(summary)
        storage = detector.quantizers[view.spec.index]
        kept.pivots.append(pivots_of(view, summary, is_vision, storage))
        kept.channels.append(magnitudes(view))
        for spec, method in methods.items():
            kept.errors[spec].append(layer_error(view, method))

    watched = watch(detector.model, list(detector.specs), inputs, visit)
    last = {spec: [error.last for error in errors] for spec, errors in kept.errors.items()}
    kept.influences = influences(watched, last)
    if whole:
        kept.prompt_influences = {s: prompt_influences(inputs, m) for s, m in methods.items()}
    return kept
