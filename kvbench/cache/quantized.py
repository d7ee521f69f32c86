"""The quantized cache of a model, and how to make one."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvbench.cache import attention
from kvbench.cache.contract import (
    EXACT,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Protocols,
    RankingWindow,
    Transform,
    Window,
)
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.layer import QuantizedLayer
from kvbench.cache.observers import Observed, attach, detach
from kvbench.cache.specs import layer_specs
from kvbench.cache.statistics import statistic_shape
from kvbench.cache.windows import Residual, Sliding
from kvbench.errors import Mistake, UserError, fault


class QuantizedCache(Cache):
    """A transformers cache whose layers hold packed storage."""

    layers: list[QuantizedLayer]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[QuantizedLayer], observed: Observed) -> None:
        """Layers that share what is observed of the model."""
        super().__init__(layers=list(layers))
        self.observed = observed

    def nbytes(self) -> int:
        """Bytes of every tensor that the cache holds."""
        return sum(layer.nbytes for layer in self.layers) + self.observed.rotary.nbytes

    def bits_per_element(self) -> float:
        """Stored bits over the numbers (keys and values of valid tokens) they stand for."""
        return 8 * self.nbytes() / max(sum(sum(layer.elements) for layer in self.layers), 1)

    def rows(self) -> list[RowUsage]:
        """What each row of the batch takes, without the padding that ragged rows bring."""
        layers = self.layers
        return [
            RowUsage(
                sum(layer.row_nbytes(row) for layer in layers)
                + self.observed.rotary.row_nbytes(layers[0].tokens[row]),
                sum(layer.elements[row] for layer in layers),
                sum(layer.packed_tokens_read[row] for layer in layers),
            )
            for row in range(len(layers[0].elements))
        ]

    @property
    def packed_tokens_read(self) -> int:
        """Tokens attention took from segments below 16 bits, summed over layers, rows and steps."""
        return sum(sum(layer.packed_tokens_read) for layer in self.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        self.observed.rotary.select(beam_idx)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.observed.forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        rows = len(self.layers[0].elements)
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)


@dataclass(frozen=True)
class RowUsage:
    """Storage and reads of one sequence of a batch."""

    nbytes: int
    elements: int
    packed_tokens_read: int

    @property
    def bits_per_element(self) -> float:
        """Stored bits over the numbers they stand for."""
        return 8 * self.nbytes / max(self.elements, 1)


@dataclass(frozen=True)
class BoundMethod:
    """A method made ready for one model: make as many caches as you like."""

    model: PreTrainedModel
    quantizers: tuple[LayerQuantizer, ...]
    specs: tuple[LayerSpec, ...]
    method: KVQuantizer
    protocol: Protocols

    def new_cache(self, vision_mask: Tensor | None = None) -> QuantizedCache:
        """An empty cache; the model is observed for as long as it lives."""
        pre_rope = any(q.key.pre_rope for q in self.quantizers)
        observed = Observed(self.method.needs, pre_rope, vision_mask)
        layers = [
            QuantizedLayer(quantizer, spec, self.protocol, observed)
            for quantizer, spec in zip(self.quantizers, self.specs, strict=True)
        ]
        cache = QuantizedCache(layers, observed)
        attach(self.model)
        weakref.finalize(cache, _detach, weakref.ref(self.model))
        return cache

    def values_folded(self) -> BoundMethod:
        """The same method for a model whose weights already carry the value transforms."""
        quantizers = tuple(
            replace(q, value=replace(q.value, transform=Transform())) for q in self.quantizers
        )
        return replace(self, quantizers=quantizers)


def bind(
    model: PreTrainedModel,
    method: str | KVQuantizer,
    *,
    protocol: Protocols = "quantized_prefill",
    calibration: Calibration | None = None,
    text_salient_layers: tuple[int, ...] = (0, 1),
) -> BoundMethod:
    """Check a method against a model and compose its storage for every layer.

    `method` is a registered name, perhaps with parameters ("akvq_vl[recent=64]"), or an instance.

    Raises:
        UserError: unknown method or protocol, statistics missing, or a layer it can't store.
    """
    if protocol not in get_args(Protocols):
        raise UserError(f"unknown protocol {protocol!r}; use one of {get_args(Protocols)}.")
    resolved = resolve(method)
    if isinstance(resolved, ForeignCache):
        raise UserError(
            f"{resolved.label} brings its own cache; call quantized_cache instead of bind."
        )
    specs = layer_specs(model.config, text_salient_layers)
    _check_statistics(resolved, calibration, specs)
    quantizers = compose(resolved, specs, calibration)
    for quantizer, spec in zip(quantizers, specs, strict=True):
        _check_layer(quantizer, spec)
        sparse = bool(quantizer.sparse_tiers) and not quantizer.heads_apart
        if protocol == "sparse_prefill" and not (sparse or quantizer.is_exact):
            raise UserError(f"{resolved.label} has no sparse prefill; use another protocol.")
    use_kvbench_attention(model)
    return BoundMethod(model, quantizers, tuple(specs), resolved, protocol)


def quantized_cache(
    model: PreTrainedModel,
    method: str | KVQuantizer | ForeignCache,
    *,
    protocol: Protocols = "quantized_prefill",
    calibration: Calibration | None = None,
    text_salient_layers: tuple[int, ...] = (0, 1),
    vision_mask: Tensor | None = None,
) -> Cache:
    """A fresh cache for one call of `model.generate(**inputs, **cache_argument(model, cache))`.

    From transformers 5.24 on that argument is `cache`, and the older name warns.

    Args:
        model: a transformers model whose decoder layers cache plain keys and values. Its attention
            implementation becomes "kvbench", which takes sdpa for all other caches.
        method: a registered name such as "akvq_vl" or "akvq_vl[recent=64]", or an instance.
        protocol: "quantized_prefill" (prompt queries see the cache as stored), "exact_prefill"
            (only the last prompt token and generated tokens do) or, for methods that have it,
            "sparse_prefill" (as that, and unimportant prompt tokens don't attend at all).
        calibration: statistics, for methods that need them (`kvbench calibrate`).
        text_salient_layers: layers with text-salient attention (AKVQ-VL, Table I).
        vision_mask: (B, T) bool, only for prompts given as embeddings.

    Returns:
        A cache whose `nbytes()` are bytes, `bits_per_element()` bits, metadata and exact tokens
        included, and `packed_tokens_read` the tokens that attention read below 16 bits; of a
        `ForeignCache`, transformers' own cache.

    Raises:
        UserError: unknown method or protocol, statistics missing, or a layer it can't store.
    """
    method = resolve(method)
    if isinstance(method, ForeignCache):
        return method.cache(model, protocol)
    bound = bind(
        model,
        method,
        protocol=protocol,
        calibration=calibration,
        text_salient_layers=text_salient_layers,
    )
    return bound.new_cache(vision_mask)


def resolve(method: str | KVQuantizer | ForeignCache) -> KVQuantizer | ForeignCache:
    """A method from its name and parameters; instances pass."""
    if not isinstance(method, str):
        return method
    from kvbench.registry import METHODS, configured, parse_spec

    name, parameters = parse_spec(method)
    return configured(METHODS.get(name), parameters)


def use_kvbench_attention(model: PreTrainedModel) -> None:
    """Switch the decoder to the "kvbench" attention function and leave vision towers alone."""
    config = model.config
    text = config.get_text_config(decoder=True)
    if text._attn_implementation == attention.NAME:
        return
    nested = text is not config and hasattr(config, "text_config")
    choice = {"text_config": attention.NAME} if nested else attention.NAME
    model.set_attn_implementation(choice)


def _check_statistics(
    method: KVQuantizer, calibration: Calibration | None, specs: Sequence[LayerSpec]
) -> None:
    have = calibration.statistics if calibration else {}
    if missing := set(method.needs.statistics) - set(have):
        raise UserError(
            f"{method.label} needs calibrated statistics ({', '.join(sorted(missing))}); run "
            "`kvbench calibrate` and pass calibration=."
        )
    for name in method.needs.statistics:
        shape = statistic_shape(name, specs)
        if tuple(have[name].shape) != shape:
            raise UserError(
                f"the calibration's {name} is {tuple(have[name].shape)} where this model needs "
                f"{shape}; calibrate this model."
            )


def compose(
    method: KVQuantizer, specs: Sequence[LayerSpec], calibration: Calibration | None
) -> tuple[LayerQuantizer, ...]:
    """Ask a method for the storage of every layer.

    Raises:
        UserError: it can't store such a layer.
        Mistake: its `layer` is broken; the message says where.
    """
    return tuple(_layer(method, spec, calibration) for spec in specs)


def _layer(method: KVQuantizer, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
    where = f"layer() of {type(method).__name__}"
    try:
        quantizer = method.layer(spec, calibration)
    except UserError:
        raise
    except Exception as error:  # a method is anyone's code
        raise Mistake(
            f"{where} fails for layer {spec.index} ({fault(error)}): repair it"
        ) from error
    if not isinstance(quantizer, LayerQuantizer):
        raise Mistake(
            f"{where} returns a {type(quantizer).__name__} for layer {spec.index}: "
            "it must return a LayerQuantizer"
        )
    return quantizer


def _check_layer(quantizer: LayerQuantizer, spec: LayerSpec) -> None:
    """Keys and values of a token must meet again in attention."""
    key, value = quantizer.key, quantizer.value
    shapes = {side.transform.stored_shape(spec) for side in (key, value)}
    if quantizer.heads_apart and (
        key.pre_rope or any(heads != spec.num_kv_heads for heads, _ in shapes)
    ):
        raise UserError("heads can't be apart where they are stored together or before RoPE.")
    if isinstance(key.window, RankingWindow) and key.window != value.window:
        raise UserError("keys and values must share a window that ranks tokens by attention.")
    mixed = len(key.codecs) > 1 or len(value.codecs) > 1
    if mixed and (set(key.codecs) != set(value.codecs) or key.window != value.window):
        raise UserError("keys and values of mixed precision must share their bits and window.")
    for side in (key, value):
        if side.recent is not None and side.recent.block != 1:
            raise UserError("tokens enter a window one by one; its codec must take them so.")
        for bits, codec in side.codecs.items():
            codec.check(side.transform.stored_shape(spec)[1])
            if bits != EXACT and (codec.block or 1) > 1:
                _check_block(side.window, codec.block or 1)


def _check_block(window: Window | None, block: int) -> None:
    """Tokens that are encoded together must leave the window together."""
    if isinstance(window, Residual):
        steps: tuple[int, ...] = (window.size, window.prompt_block or block)
    elif isinstance(window, Sliding) and window.prompt:
        steps = (window.flush_every,)
    else:
        raise UserError(f"groups of {block} tokens need a window that releases whole groups.")
    if any(step % block for step in steps):
        raise UserError(
            f"the residual ({steps[0]}) must be a multiple of the group size ({block})."
        )


def _detach(reference: weakref.ref[nn.Module]) -> None:
    model = reference()
    if model is not None:
        detach(model)
