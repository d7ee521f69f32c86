"""Stored bits of many settings at once, from prompts that the model runs once.

The model shows each layer's states, and every setting stores them as it would in a cache of its
own: what is counted is what a cache holds after all tokens, to the byte, under `exact_prefill`.
Under `quantized_prefill` later layers see other states, and a plan that looks at them may differ
a little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvbench.analysis.capture import LayerView, watch
from kvbench.analysis.errors import layer_size
from kvbench.cache import BoundMethod, LayerQuantizer, LayerSpec, Needs, Side

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvbench.models.inputs import ModelInputs


@dataclass(frozen=True)
class Prompt:
    """What a cache is to hold, from the first token to the last.

    Attributes:
        group: Its task, or its text: groups weigh the same.
        inputs: One row of T tokens.
        at_once: Tokens that the model reads in one pass; the rest is decoded. None is all.
    """

    group: str
    inputs: ModelInputs
    at_once: int | None = None


def stored_bits(
    model: PreTrainedModel,
    prompts: Iterable[Prompt],
    methods: Sequence[BoundMethod],
    *,
    shared: bool = False,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Bits an element of each method: mean over a group's prompts, then over groups.

    Args:
        model: The model that the methods are bound to.
        prompts: What to store.
        methods: The settings.
        shared: Take layers with the same parts for equally large even where a plan looks at the
            states: an estimate, much faster.
        advance: Called after each prompt.
    """
    found: list[dict[str, list[float]]] = [{} for _ in methods]
    for prompt in prompts:
        meter = _Meter(methods, shared, prompt.at_once)
        watch(model, list(methods[0].specs), prompt.inputs, meter.visit)
        for by_group, bits in zip(found, meter.bits(), strict=True):
            by_group.setdefault(prompt.group, []).append(bits)
        advance()
    return [fmean(map(fmean, by_group.values())) for by_group in found]


def depends_on_states(needs: Needs) -> bool:
    """Whether the size of what is stored may depend on more than lengths and modality."""
    return replace(needs, modality=False, statistics=()) != Needs()


class _Meter:
    """Bytes of one prompt in every method, and the numbers that they stand for."""

    def __init__(self, methods: Sequence[BoundMethod], shared: bool, at_once: int | None) -> None:
        self._methods, self._at_once = methods, at_once
        self._by_parts = [shared or not depends_on_states(m.method.needs) for m in methods]
        self._sizes = [(0, 0)] * len(methods)
        self._known: dict[str, tuple[int, int]] = {}
        self._positions = 0

    def visit(self, view: LayerView) -> None:
        """Store one layer in every way."""
        self._positions = view.observed.rotary.row_nbytes(view.keys.shape[1])
        for place, method in enumerate(self._methods):
            nbytes, elements = self._layer(view, method, self._by_parts[place])
            before = self._sizes[place]
            self._sizes[place] = before[0] + nbytes, before[1] + elements

    def bits(self) -> list[float]:
        """Of each method, when all layers have been visited."""
        return [
            8 * (nbytes + self._shared_nbytes(method)) / elements
            for (nbytes, elements), method in zip(self._sizes, self._methods, strict=True)
        ]

    def _shared_nbytes(self, method: BoundMethod) -> int:
        """Positions, which all layers share, where keys are stored before RoPE."""
        return self._positions if any(q.key.pre_rope for q in method.quantizers) else 0

    def _layer(self, view: LayerView, method: BoundMethod, by_parts: bool) -> tuple[int, int]:
        needs = method.method.needs
        looks = depends_on_states(replace(needs, residual=False))
        if not by_parts:
            return layer_size(view, method, all_queries=looks, at_once=self._at_once)
        index = view.spec.index
        key = _parts(method.quantizers[index], method.specs[index])
        if key not in self._known:
            self._known[key] = layer_size(view, method, all_queries=looks, at_once=self._at_once)
        return self._known[key]


def _parts(quantizer: LayerQuantizer, spec: LayerSpec) -> str:
    """What decides a layer's bytes; two layers of the same text are equally large."""
    sides = [_size(side, spec) for side in (quantizer.key, quantizer.value)]
    return repr((sides, quantizer.plan, replace(spec, index=0)))


def _size(side: Side, spec: LayerSpec) -> tuple[Any, ...]:
    heads, channels = side.transform.stored_shape(spec)
    codecs = [
        (tier, codec.block, codec.bits_per_element(channels))
        for tier, codec in sorted(side.codecs.items())
    ]
    return codecs, side.window, side.pre_rope, heads, channels
