"""Llama-shaped decoder stacks with fused kernels around torch's matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from kvbench.cache.contract import Transform
from kvbench.cache.observers import decoder_stack
from kvbench.cache.transforms import Rotate
from kvbench.efficiency.static_cache import StaticCache
from kvbench.efficiency.static_prompts import StaticPrompts
from kvbench.kernels.decoder_ops import add_rms_norm, rope, silu_mul

LLAMA_SHAPED = ("llama", "mistral", "qwen2")
"""Model types of transformers whose decoder layer is: norm, q k v, rotary, o, norm, SwiGLU."""

Angles = tuple[Tensor, Tensor]
"""Cosines and sines (T, D) of every token's place."""


class FusedDecoder:
    """The decoder stack of a model, for prompts and for steps on a static cache.

    Projections that share their input become one matrix; the model's own modules keep working, as
    views of it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Fuse the weights in place."""
        self._stack = decoder_stack(model)
        self._head = model.get_output_embeddings()
        self._layers = [_FusedLayer(*each) for each in enumerate(self._stack.layers)]

    def step(self, tokens: Tensor, cache: StaticCache) -> Tensor:
        """(B,) int64 token ids to logits (B, vocabulary)."""
        cache.begin()
        hidden = embedding(tokens, self._stack.embed_tokens.weight)
        places = cache.tokens[:, None].long()
        cos, sin = (x[:, 0] for x in self._stack.rotary_emb(hidden[:, None], places))
        residual: Tensor | None = None
        for layer in self._layers:
            hidden, residual = layer.step(hidden, residual, (cos, sin), cache)
        normed, _ = _norm(self._stack.norm, hidden, residual)
        cache.end()
        return self._logits(normed)

    def prefill(self, embeddings: Tensor, prompts: StaticPrompts) -> Tensor:
        """(b, n, hidden) prompts without padding to their last tokens' logits (b, vocabulary)."""
        rows, new, width = embeddings.shape
        places = torch.arange(new, device=embeddings.device)[None]
        cos, sin = self._stack.rotary_emb(embeddings, places)
        cos, sin = (x.expand(rows, -1, -1).reshape(rows * new, -1) for x in (cos, sin))
        hidden = embeddings.reshape(rows * new, width)
        residual: Tensor | None = None
        for layer in self._layers:
            hidden, residual = layer.prefill(hidden, residual, (cos, sin), prompts)
        last = slice(new - 1, None, new)
        stream = None if residual is None else residual[last]
        normed, _ = _norm(self._stack.norm, hidden[last], stream)
        return self._logits(normed)

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = linear(states, self._head.weight, self._head.bias)
        return logits


class _FusedLayer:
    """One decoder layer, on (T, hidden) tokens."""

    def __init__(self, index: int, layer: Any) -> None:
        self._index = index
        attention, mlp = layer.self_attn, layer.mlp
        self._attention = attention
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._qkv = _fused([attention.q_proj, attention.k_proj, attention.v_proj])
        self._gate_up = _fused([mlp.gate_proj, mlp.up_proj])
        self._out, self._down = attention.o_proj, mlp.down_proj

    def step(
        self, hidden: Tensor, residual: Tensor | None, angles: Angles, cache: StaticCache
    ) -> tuple[Tensor, Tensor]:
        """One token a row: what comes out and the residual stream it is to be added to."""
        normed, residual = _norm(self._norms[0], hidden, residual)
        layer = cache.layers[self._index]
        transform, spec = layer.key_transform, layer.spec
        rotate = isinstance(transform, Rotate) and transform.is_sylvester
        query, keys, values = rope(
            linear(normed, *self._qkv), *angles, spec.num_heads, spec.num_kv_heads, rotate
        )
        if not rotate and type(transform) is not Transform:
            keys = transform.store(keys[:, :, None])[:, :, 0]
            query = transform.attend(query[:, :, None])[:, :, 0]
        cache.append(self._index, keys, values)
        out = cache.attend(self._index, query, self._attention.scaling)
        cache.settle(self._index)
        return self._rest(out.flatten(1), residual)

    def prefill(
        self, hidden: Tensor, residual: Tensor | None, angles: Angles, prompts: StaticPrompts
    ) -> tuple[Tensor, Tensor]:
        """Whole prompts, one row's tokens after another's."""
        normed, residual = _norm(self._norms[0], hidden, residual)
        qkv = linear(normed, *self._qkv)
        del normed, hidden
        stream = residual.view(prompts.count, -1, residual.shape[-1])
        return self._rest(self._attend_prompts(qkv, angles, stream, prompts), residual)

    def _attend_prompts(
        self, qkv: Tensor, angles: Angles, stream: Tensor, prompts: StaticPrompts
    ) -> Tensor:
        """(T, Hq · D). A function of its own, so that states are gone before the MLP runs."""
        spec = prompts.spec(self._index)
        query, keys, values = (
            x.unflatten(0, (prompts.count, -1)).transpose(1, 2)
            for x in rope(qkv, *angles, spec.num_heads, spec.num_kv_heads, False)
        )
        out = prompts.attend(self._index, self._attention, query, keys, values, stream)
        return out.transpose(1, 2).reshape(len(qkv), -1)

    def _rest(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Output projection and MLP."""
        hidden = linear(attended, self._out.weight, self._out.bias)
        normed, residual = _norm(self._norms[1], hidden, residual)
        gated = silu_mul(linear(normed, *self._gate_up))
        return linear(gated, self._down.weight, self._down.bias), residual


def unsupported_model(model: PreTrainedModel) -> str | None:
    """Why a model has no fused decoder, or None if it has."""
    config = model.config.get_text_config(decoder=True)
    if config.model_type not in LLAMA_SHAPED:
        return f"its decoder ({config.model_type}) is not Llama-shaped"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    return None


def _norm(norm: Any, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return add_rms_norm(hidden, residual, norm.weight, norm.variance_epsilon)


def _fused(modules: list[Any]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for all; each linear module's own become views of them."""
    weight = _joined([module.weight for module in modules])
    if modules[0].bias is None:
        return weight, None
    return weight, _joined([module.bias for module in modules])


def _joined(parameters: list[Tensor]) -> Tensor:
    joined = torch.cat([parameter.data for parameter in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = joined[start : start + len(parameter)]
        start += len(parameter)
    return joined
