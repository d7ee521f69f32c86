"""What kvbench must know of a model's attention layers, read from its configuration."""

from __future__ import annotations

from typing import Any

from kvbench.cache.contract import LayerSpec
from kvbench.errors import UserError

_KINDS = {"full_attention", "sliding_attention"}


def layer_specs(config: Any, text_salient_layers: tuple[int, ...] = ()) -> list[LayerSpec]:
    """One spec a decoder layer of a transformers configuration (multimodal or text).

    Raises:
        UserError: the model doesn't cache plain keys and values in every layer.
    """
    name = getattr(config, "model_type", type(config).__name__)
    text = config.get_text_config(decoder=True)
    if (
        getattr(config, "is_encoder_decoder", False)
        or getattr(text, "kv_lora_rank", None)  # latents of multi-head latent attention
        or getattr(text, "num_kv_shared_layers", None)  # layers that read another layer's cache
        or getattr(text, "num_attention_heads", None) is None
    ):
        raise UserError(
            f"models of type {name} don't cache plain keys and values; kvbench can't quantize them."
        )
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or (
        ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    )
    if unknown := set(kinds) - _KINDS:
        raise UserError(f"layers of kind {sorted(unknown)} in a {name} model can't be quantized.")
    heads = text.num_attention_heads
    return [
        LayerSpec(
            index=index,
            num_layers=text.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            text_salient=index in text_salient_layers,
            sliding_window=window if kind == "sliding_attention" else None,
        )
        for index, kind in enumerate(kinds)
    ]
