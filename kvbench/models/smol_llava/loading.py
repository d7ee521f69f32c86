"""Loading the bundled model: merged once into an ordinary checkpoint folder, then read from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.models.smol_llava import architecture, weights
from kvbench.models.smol_llava.convert import converted_folder, text_config
from kvbench.models.smol_llava.folders import cache_root, digest, make_once

if TYPE_CHECKING:
    import torch


def load_merged(device: str, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """What `kvbench.models.smol_llava.load` promises."""
    import torch
    from transformers import LlavaForConditionalGeneration

    folder = merged_folder()
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype or torch.bfloat16, local_files_only=True
    )
    processor = architecture.build_processor(architecture.load_tokenizer(folder))
    return model.to(device).eval(), processor, folder.name.rpartition("-")[2]


def load_base(device: str, dtype: torch.dtype | None) -> tuple[Any, Any, str]:
    """What `kvbench.models.smol_llava.load_language` promises."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = converted_folder()
    model: Any = LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.bfloat16, local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), tokenizer, folder.name.rpartition("-")[2]


def merged_folder(path: Path = weights.WEIGHTS, root: Path | None = None) -> Path:
    """An ordinary LLaVA checkpoint folder of the model, written on first use.

    Args:
        path: the trained weights.
        root: where the folder is kept; the user's cache folder if None.

    Raises:
        UserError: the trained weights or those of SmolLM2 are missing.
    """
    state, notes = weights.read(path)
    target = (root or cache_root()) / f"smol_llava-{digest(path)[:16]}"
    return make_once(target, lambda fresh: write_merged(state, notes["scale"], fresh))


def write_merged(state: dict[str, Any], scale: float, folder: Path) -> None:
    """Merges trained weights into SmolLM2 and writes model and processor into `folder`."""
    import torch

    base = converted_folder()
    model, tokenizer = assemble(base)
    weights.merge(model, state, scale)
    model.to(torch.bfloat16).save_pretrained(folder)
    architecture.build_processor(tokenizer).save_pretrained(folder)


def assemble(base: Path) -> tuple[Any, Any]:
    """A LLaVA with SmolLM2's weights, float32, and its tokenizer; vision parts are random.

    Args:
        base: a folder of `converted_folder`.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    language = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    tokenizer = architecture.build_tokenizer(base)
    config = architecture.llava_config(text_config(language.config), tokenizer.image_token_id)
    model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.eval(), tokenizer
