"""What each choice costs and spoils in each layer, the layer's input exact (KVTuner, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvbench.analysis.capture import LayerView, watch
from kvbench.analysis.errors import layer_error
from kvbench.cache import BoundMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvbench.models.inputs import ModelInputs

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Means over prompts; rows are layers, columns are choices.

    Attributes:
        choices: Names of the columns.
        error: Relative error of the layer's attention output.
        bits: Stored bits an element of the layer, metadata and exact tokens counted.
        nbytes: Bytes of the layer.
    """

    choices: tuple[str, ...]
    error: Numbers
    bits: Numbers
    nbytes: Numbers

    def cost(self, table: Sequence[str]) -> tuple[float, float]:
        """Bits an element and bytes of a prompt with a choice for each layer."""
        columns = [self.choices.index(choice) for choice in table]
        layers = np.arange(len(table))
        return float(self.bits[layers, columns].mean()), float(self.nbytes[layers, columns].sum())

    @property
    def nbytes_a_bit(self) -> float:
        """Bytes of a prompt's cache at one bit an element."""
        bits, nbytes = self.cost([self.choices[0]] * len(self.bits))
        return nbytes / bits


def measure(
    model: PreTrainedModel,
    prompts: Sequence[ModelInputs],
    methods: Mapping[str, BoundMethod],
    advance: Callable[[], None],
) -> Sensitivity:
    """Run each prompt (B = 1) once and store every layer in every way."""
    first = next(iter(methods.values()))
    shape = (len(prompts), len(first.specs), len(methods))
    error, bits, nbytes = np.zeros((3, *shape))
    for place, inputs in enumerate(prompts):

        def visit(view: LayerView, place: int = place) -> None:
            elements = 2 * view.keys.numel()
            for column, method in enumerate(methods.values()):
                found = layer_error(view, method)
                error[place, view.spec.index, column] = found.output
                nbytes[place, view.spec.index, column] = found.nbytes
                bits[place, view.spec.index, column] = 8 * found.nbytes / elements

        watch(model, list(first.specs), inputs, visit)
        advance()
    return Sensitivity(tuple(methods), *(x.mean(0) for x in (error, bits, nbytes)))
