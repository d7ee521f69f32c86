"""The zoo's models by shape alone: memory and speed don't ask what the weights are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.models.zoo import ModelEntry

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def configuration(entry: ModelEntry) -> PretrainedConfig:
    """The configuration of a model, from its folder or from what is known of its checkpoint.

    Only config.json is needed of a folder. A bundled model is loaded.

    Raises:
        UserError: The folder's configuration can't be read, or the model has neither.
    """
    if entry.folder is None and entry.loader is not None:
        from kvbench.models.load import load_model

        return load_model(entry).model.config
    if entry.folder is None and entry.name in ARCHITECTURES:
        return ARCHITECTURES[entry.name]()
    folder = entry.folder or _downloaded(entry)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, or of the library that it checks types with
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder / 'config.json'} can't be read ({reason}): download it again"
        ) from error


def _downloaded(entry: ModelEntry) -> Path:
    """The checkpoint of a plug-in's model in the hub's local cache."""
    from kvbench.models.folders import checkpoint_folder

    try:
        return checkpoint_folder(entry)
    except UserError as error:
        raise UserError(
            f"the shapes of {entry.name} are not known: give a folder with its config.json,"
            f" {entry.name}=/folder"
        ) from error


def random_model(
    entry: ModelEntry, device: str, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of the right shape with random weights, made on its device.

    Weights are drawn as transformers does before training: normal with a deviation of about 0.02,
    norms 1, biases 0.

    Raises:
        UserError: As `configuration`.
    """
    import torch
    import transformers

    from kvbench.models.vision import allow_single_tiles

    config = configuration(entry)
    kind = "CausalLM" if entry.family == "text" else "ImageTextToText"
    cuda = [torch.device(device)] if device.startswith("cuda") else []
    # Made where it stays: a detour over the host takes minutes at 7 billion parameters.
    with torch.random.fork_rng(cuda), torch.device(device):
        torch.manual_seed(seed)
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    if entry.family == "llava_next":
        allow_single_tiles(model)
    return model.eval().requires_grad_(False)


def _llama(size: dict[str, Any]) -> Callable[[], Any]:
    """Vicuna: LLaMA 2 with room for LLaVA's image and padding tokens."""

    def make() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            **size, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5
        )

    return make


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(
        vocab_size=32064,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        sliding_window=None,
    )


def _clip() -> Any:
    """ViT-L/14 at 336 pixels: 577 tokens, 576 of which are kept."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava(text: Callable[[], Any]) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(vision_config=_clip(), text_config=text(), image_token_index=32000)


def _llava_next(text: Callable[[], Any]) -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        vision_config=_clip(),
        text_config=text(),
        image_token_index=32000,
        image_grid_pinpoints=_PINPOINTS,
    )


def _qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            bos_token_id=151643,
            eos_token_id=151645,
        ),
        vision_config=dict(
            depth=32, embed_dim=1280, hidden_size=3584, num_heads=16, patch_size=14, mlp_ratio=4
        ),
        tie_word_embeddings=False,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        image_token_id=151655,
        video_token_id=151656,
    )


_VICUNA_7B = _llama({})
_VICUNA_13B = _llama(
    {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    }
)
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llava15_7b": lambda: _llava(_VICUNA_7B),
    "llava15_13b": lambda: _llava(_VICUNA_13B),
    "llava16_vicuna": lambda: _llava_next(_VICUNA_7B),
    "llava16_mistral": lambda: _llava_next(_mistral),
    "qwen2vl_7b": _qwen2_vl,
}
"""Configurations by the zoo's names, after the config.json of each hub id."""
