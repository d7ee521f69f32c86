"""What memory and time depend on in a model, read from its configuration: no weights, no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvbench.cache.observers import decoder_stack
from kvbench.cache.specs import layer_specs
from kvbench.errors import UserError


@dataclass(frozen=True)
class DecoderShape:
    """Widths of a decoder stack, in numbers a token."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    """All query heads; `states` are all heads of the keys, or of the values."""
    states: int
    vocabulary: int

    @property
    def prompt(self) -> int:
        """Numbers of a prompt token that live together at the worst moment of a layer.

        In the MLP: the embeddings, the layer's input, the residual stream and the normed input;
        gate, up and their product. In attention: embeddings, input and normed input, the query,
        exact and stored keys and values with those that are read back, and the output.
        """
        mlp = 4 * self.hidden + 3 * self.intermediate
        attention = 3 * self.hidden + 2 * self.query + 7 * self.states
        return max(mlp, attention)

    @property
    def step(self) -> int:
        """Numbers of a row that a decode step's layer keeps alive, all of its buffers together."""
        return 4 * self.hidden + 3 * self.intermediate + 2 * (self.query + self.states)


@dataclass(frozen=True)
class TowerShape:
    """Widths of a vision tower, in numbers a patch."""

    patches: float
    """For each token that the decoder sees."""
    width: int
    """Numbers that live together at the worst moment, pixels among them."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's parts."""

    language_bytes: int
    """Decoder, embeddings and head, buffers included."""
    vision_bytes: int
    """Vision tower and projector."""
    linear_parameters: int
    """Numbers in the language model's matrices: what a token is multiplied with."""
    itemsize: int

    @property
    def linear_bytes(self) -> int:
        """Bytes of weights that a decode step reads; of the embeddings it reads a row a token."""
        return self.linear_parameters * self.itemsize


@dataclass(frozen=True)
class ModelShape(Weights):
    """Bytes of a model's parts and widths of its layers."""

    decoder: DecoderShape
    tower: TowerShape | None


def empty_model(config: Any, dtype: str = "float16") -> PreTrainedModel:
    """The model that a transformers configuration describes, its weights without storage.

    Raises:
        UserError: transformers can't build it.
    """
    kind = "ImageTextToText" if hasattr(config, "vision_config") else "CausalLM"
    try:
        with torch.device("meta"):
            auto = getattr(transformers, f"AutoModelFor{kind}")
            model: PreTrainedModel = auto.from_config(config, dtype=getattr(torch, dtype))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"transformers can't build a {getattr(config, 'model_type', 'nameless')} model from "
            f"its configuration ({error}): choose a model of the zoo"
        ) from error
    return model


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Bytes and widths of a model, real or empty.

    Raises:
        UserError: its layers can't be cached, or its vision tower is of an unknown form.
    """
    config = model.config
    tower = _tower(config) if hasattr(config, "vision_config") else None
    return ModelShape(**vars(weights_of(model)), decoder=_decoder(config), tower=tower)


def weights_of(model: PreTrainedModel) -> Weights:
    """Bytes of a model's parts; weights that several modules share count once."""
    stack, head = decoder_stack(model), model.get_output_embeddings()
    parts = {id(tensor): tensor for part in (stack, head) for tensor in _tensors(part)}
    language = _nbytes(parts.values())
    linear = [module for module in stack.layers.modules() if isinstance(module, nn.Linear)]
    return Weights(
        language_bytes=language,
        vision_bytes=_nbytes(_tensors(model)) - language,
        linear_parameters=sum(module.weight.numel() for module in (*linear, head)),
        itemsize=model.dtype.itemsize,
    )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _decoder(config: Any) -> DecoderShape:
    text, spec = config.get_text_config(decoder=True), layer_specs(config)[0]
    return DecoderShape(
        layers=spec.num_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        query=spec.num_heads * spec.head_dim,
        states=spec.num_kv_heads * spec.head_dim,
        vocabulary=text.vocab_size,
    )


def _tower(config: Any) -> TowerShape:
    """CLIP's form, or Qwen2-VL's with rotary embedding in float32.

    Raises:
        UserError: neither.
    """
    vision = config.vision_config
    if hasattr(vision, "spatial_merge_size"):
        pixels, width = vision.temporal_patch_size * 3 * vision.patch_size**2, vision.embed_dim
        # Input and normed input, qkv, and six float32 tensors of queries and keys.
        rotary = 17 * width + 4 * width // vision.num_heads
        mlp = 3 * width + 3 * int(vision.mlp_ratio * width)
        return TowerShape(float(vision.spatial_merge_size**2), pixels + max(rotary, mlp))
    if hasattr(vision, "image_size") and hasattr(vision, "patch_size"):
        tokens = (vision.image_size // vision.patch_size) ** 2
        # Input, residual, normed input twice; in the MLP x, its sigmoid and their product.
        width = 4 * vision.hidden_size + 3 * vision.intermediate_size
        return TowerShape((tokens + 1) / tokens, width + 3 * vision.patch_size**2)
    raise UserError(
        f"no memory model is known for vision towers of type {vision.model_type}: measure instead"
    )
