"""Which layer's error moves the answer: one layer at a time holds what a method stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor

from kvbench.analysis.capture import Watched
from kvbench.cache import EXACT, BoundMethod, LayerQuantizer, Side, Uniform
from kvbench.evaluation.decode import prefill

if TYPE_CHECKING:
    from kvbench.models.inputs import ModelInputs


@dataclass(frozen=True)
class Influence:
    """What one layer's storage does to a prompt's first answer token, all else exact.

    Attributes:
        divergence: KL(exact || method in this layer) of the first answer token, nats.
        changed: Whether another token is the most likely one.
    """

    divergence: float
    changed: bool


def influences(
    watched: Watched, last: Mapping[str, Sequence[Tensor]]
) -> dict[str, list[Influence]]:
    """What each layer does under `exact_prefill`, for all methods in one run of the last token.

    Args:
        watched: The prompt.
        last: By method, for each layer, the attention output (Hq, D) of the last token on what
            the method stored: all that the first answer token sees of it.
    """
    rows = [{layer: out} for outs in last.values() for layer, out in enumerate(outs)]
    exact, *others = watched.last_token([{}, *rows]).double().log_softmax(-1).cpu()
    found = (_influence(exact, other) for other in others)
    return {spec: list(islice(found, len(outs))) for spec, outs in last.items()}


def prompt_influences(inputs: ModelInputs, method: BoundMethod) -> list[Influence]:
    """What each layer does under the method's own protocol, a run of the model for each layer.

    Under `quantized_prefill` every prompt token reads what the layer stores, and later layers build
    on that.
    """
    exact = LayerQuantizer(Side(), Side(), Uniform(EXACT))
    none = (exact,) * len(method.quantizers)
    reference = _first_token(inputs, method, none)
    return [
        _influence(reference, _first_token(inputs, method, (*none[:at], own, *none[at + 1 :])))
        for at, own in enumerate(method.quantizers)
    ]


def _first_token(
    inputs: ModelInputs, method: BoundMethod, quantizers: tuple[LayerQuantizer, ...]
) -> Tensor:
    """(V,) log-probabilities of the first answer token with this storage."""
    cache = replace(method, quantizers=quantizers).new_cache()
    return prefill(method.model, inputs, cache)[0].double().log_softmax(-1).cpu()


def _influence(exact: Tensor, other: Tensor) -> Influence:
    divergence = float((exact.exp() * (exact - other)).sum())
    return Influence(max(divergence, 0.0), int(other.argmax()) != int(exact.argmax()))
