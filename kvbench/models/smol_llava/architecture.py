"""What `smol_llava` is made of: configuration, tokenizer, processor, prompt text.

Everything comes from transformers' own LLaVA classes, so the model is an ordinary LLaVA
checkpoint once its folder is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor, SiglipVisionConfig

IMAGE_SIZE = 64
PATCH = 8
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH) ** 2
IMAGE_TOKEN = "<image>"
RESERVED_TOKEN = "<reponame>"
"""A token of SmolLM2's vocabulary that no text uses (the one in use is `<repo_name>`).

The image token takes its place and id, so the embedding matrix keeps its size.
"""


def vision_config() -> SiglipVisionConfig:
    """The vision tower: 6 layers of width 256 over 8 x 8 patches, 4.8 million parameters."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )


def llava_config(text: Any, image_token_id: int) -> LlavaConfig:
    """The whole model's configuration.

    Args:
        text: the language model's `LlamaConfig`.
        image_token_id: the id of `IMAGE_TOKEN`.
    """
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=image_token_id,
        image_seq_length=TOKENS_PER_IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


def build_tokenizer(folder: Path) -> Any:
    """The tokenizer of a converted SmolLM2 folder with `IMAGE_TOKEN` for `RESERVED_TOKEN`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = folder / "chat_template.jinja"
    return make(
        tokenizer_object=Tokenizer.from_str(
            _with_image_token((folder / "tokenizer.json").read_text())
        ),
        **{name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")},
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=settings["model_max_length"],
        chat_template=template.read_text() if template.is_file() else None,
    )


def _with_image_token(text: str) -> str:
    """Renames the reserved token in a `tokenizer.json`; its id stays."""
    content = json.loads(text)
    vocabulary = content["model"]["vocab"]
    vocabulary[IMAGE_TOKEN] = vocabulary.pop(RESERVED_TOKEN)
    for token in content["added_tokens"]:
        if token["content"] == RESERVED_TOKEN:
            token["content"] = IMAGE_TOKEN
    return json.dumps(content, ensure_ascii=False)


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """Images of any size to float32 (3, 64, 64) tensors of x / 127.5 - 1; text around them.

    The image processor is transformers' Pil class by name, because the plain name means
    another implementation where torchvision is installed.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    make: Any = LlavaProcessor
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessorPil(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return make(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=tokenizer.chat_template,
    )


def chat(prompt: str) -> str:
    """One user turn and the open assistant turn, in SmolLM2's chat markup without system text."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a merged model's folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
