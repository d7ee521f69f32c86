"""A prompt's queries, keys, values and residual stream, layer by layer, as the model computes them.

The model runs one prompt with a cache that stays exact and shows each layer to a visitor while its
attention is at hand. Afterwards the prompt's last token can be run again, in many rows at once,
with single layers' attention outputs replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from kvbench.cache import LayerSpec, Needs, observing
from kvbench.cache.attention import StoredStates, attention
from kvbench.cache.observers import Observed
from kvbench.cache.quantized import use_kvbench_attention
from kvbench.cache.watching import WatchingLayer
from kvbench.evaluation.decode import decode_step, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvbench.models.inputs import ModelInputs


@dataclass(frozen=True)
class LayerView:
    """One attention layer at work on a prompt of T tokens without padding.

    Attributes:
        spec: The layer.
        query: (Hq, T, D) after RoPE.
        keys: (H, T, D) after RoPE.
        values: (H, T, D).
        residual: (T, hidden) residual stream entering the layer.
        scaling: Factor of the logits.
        softcap: Bound of the logits (Gemma-2), or None.
        mask: (T, T) of the model's own, bool or added to the logits; None is causal.
        observed: What a cache knows of the prompt.
        attend: Exact attention output of the layer, (Hq, T, D), made when called.
    """

    spec: LayerSpec
    query: Tensor
    keys: Tensor
    values: Tensor
    residual: Tensor
    scaling: float
    softcap: float | None
    mask: Tensor | None
    observed: Observed
    attend: Callable[[], Tensor]


Visitor = Callable[[LayerView], None]


class _WatchedLayer(WatchingLayer):
    """Keeps one prompt's exact states; later single tokens see them from any number of rows."""

    def __init__(self, spec: LayerSpec, observed: Observed, visit: Visitor) -> None:
        super().__init__(spec, observed)
        self.visit = visit
        self.replaced: Mapping[int, Tensor] = {}
        """Rows of the next step whose attention output (Hq, D) is given."""

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        if not self.length:
            self.prompt_keys, self.prompt_values = key_states[0], value_states[0]
        return super().update(key_states, value_states)

    def attend(
        self, module: nn.Module, query: Tensor, step: StoredStates, mask: Tensor | None, **how: Any
    ) -> Tensor:
        scaling, softcap = how["scaling"], how.get("softcap")
        if query.shape[2] == 1:
            return self._attend_last(query, step, scaling, softcap)
        out = attention(module, query, step.keys, step.values, mask, **how)[0].transpose(1, 2)
        own = None if mask is None else mask[0, 0, :, : query.shape[2]]
        residual = self.observed.residual.pop(self.spec.index)
        self.visit(
            LayerView(
                self.spec,
                query[0],
                step.keys[0],
                step.values[0],
                residual[0],
                scaling,
                softcap,
                own,
                self.observed,
                lambda: out[0],
            )
        )
        return out

    def _attend_last(
        self, query: Tensor, step: StoredStates, scaling: float, softcap: float | None
    ) -> Tensor:
        """(R, Hq, 1, D): the prompt's last token in R rows, each with key and value of its own."""
        window, tokens = self.spec.sliding_window, self.prompt_keys.shape[1]
        before = slice(max(tokens - window, 0) if window else 0, tokens - 1)
        grouped = query[:, :, 0].unflatten(1, (self.spec.num_kv_heads, -1)).float()
        old = torch.einsum("rhgd,htd->rhgt", grouped, self.prompt_keys[:, before].float())
        own = torch.einsum("rhgd,rhtd->rhgt", grouped, step.keys.float())
        logits = torch.cat((old, own), -1) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        old, own = logits.softmax(-1).split((old.shape[-1], 1), -1)
        out = torch.einsum("rhgt,htd->rhgd", old, self.prompt_values[:, before].float())
        out = (out + own * step.values.float()).flatten(1, 2).to(query.dtype)
        for row, given in self.replaced.items():
            out[row] = given.to(out.dtype)
        return out[:, :, None]


class _WatchingCache(Cache):
    layers: list[_WatchedLayer]  # type: ignore[assignment]

    def __init__(self, specs: list[LayerSpec], visit: Visitor) -> None:
        self.observed = Observed(Needs(modality=True, residual=True), pre_rope=True)
        super().__init__(layers=[_WatchedLayer(spec, self.observed, visit) for spec in specs])


class Watched:
    """A prompt that has been run: its last token can be run again."""

    def __init__(self, model: PreTrainedModel, inputs: ModelInputs, cache: _WatchingCache) -> None:
        """Keep the prompt's exact states."""
        self._model, self._inputs, self._cache = model, inputs, cache

    def last_token(self, replaced: list[dict[int, Tensor]]) -> Tensor:
        """Logits (R, V) after the prompt, its last token run in R rows.

        `replaced[r]` names layers of row r whose attention output (Hq, D) is taken as given; {}
        is the model as it is.
        """
        for index, layer in enumerate(self._cache.layers):
            rows = {row: given[index] for row, given in enumerate(replaced) if index in given}
            layer.replaced = rows
            layer.length = layer.prompt_keys.shape[1] - 1
        ids = self._inputs.input_ids[:, -1:].expand(len(replaced), -1)
        mask = self._inputs.attention_mask.expand(len(replaced), -1)
        with observing(self._model), torch.no_grad():
            return decode_step(self._model, ids, mask, self._cache)


def watch(
    model: PreTrainedModel, specs: list[LayerSpec], inputs: ModelInputs, visit: Visitor
) -> Watched:
    """Run one prompt (B = 1) and show each layer to `visit`.

    The model's attention implementation becomes "kvbench", which takes sdpa for other caches.
    """
    use_kvbench_attention(model)
    cache = _WatchingCache(specs, visit)
    with observing(model):
        prefill(model, inputs, cache)
    return Watched(model, inputs, cache)
