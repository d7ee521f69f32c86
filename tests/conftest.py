"""Offline test bed: environment, a byte-level tokenizer and tiny random models of every family.

How much the random tests try is set by environment variables, all with a small default:

KVBENCH_EXAMPLES  examples of each property-based test, other ones at every run (default: 40, always
                  the same)
KVBENCH_FUZZ      mutated data sets that the reader is given (300)
KVBENCH_KILLS     moments at which the writer of a result file is killed (6)
KVBENCH_SOAK      samples answered in one process whose memory must not grow (240)
"""

from __future__ import annotations

import os

# Read when torch, transformers and triton are imported, so set before any of them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Without a GPU, Triton kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "0" if os.path.exists("/dev/nvidiactl") else "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import functools
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from kvbench.cache import Affine, LayerQuantizer, Needs, Side, Uniform
from kvbench.registry import METHODS

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background jobs ignore Ctrl-C, and so would every process that a test interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_EXAMPLES = os.environ.get("KVBENCH_EXAMPLES")
hypothesis.settings.register_profile(
    "kvbench",
    deadline=None,  # machines that are shared stand still at times
    max_examples=int(_EXAMPLES or 40),
    derandomize=_EXAMPLES is None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("kvbench")

IMAGE_SIZE, PATCH = 56, 14  # 4 x 4 patches: 16 tokens an image for LLaVA
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
QWEN_SPECIALS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEXT_MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@dataclass(frozen=True)
class Tiny:
    """A tiny random model and what feeds it; `processor` is None where there is none."""

    model: Any
    tokenizer: Any
    image_processor: Any = None
    processor: Any = None

    def save(self, folder: Path) -> Path:
        """Write everything as `save_pretrained` does; return `folder`."""
        self.model.save_pretrained(folder)
        for part in (self.processor,) if self.processor else (self.tokenizer, self.image_processor):
            if part is not None:
                part.save_pretrained(folder)
        return folder


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless byte-level tokenizer of 265 tokens that puts `<s>` before every text."""
    specials = SPECIALS + QWEN_SPECIALS
    symbols = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={
            "image_token": "<image>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
            "image_pad": "<|image_pad|>",
            "video_pad": "<|video_pad|>",
        },
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _decoder_settings(vocab_size: int) -> dict[str, Any]:
    """Three grouped-query layers of width 64, as the decoder of every tiny vision model.

    Weights ten times the usual size make attention uneven, so that a wrong cache shows.
    """
    return dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=32,
    )


def build_llava() -> Tiny:
    """LLaVA-1.5 in small: head_dim 16, 16 tokens an image."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=_vision_config(),
        text_config=LlamaConfig(**_decoder_settings(len(tokenizer)), head_dim=16),
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Tiny(LlavaForConditionalGeneration(config).eval(), tokenizer, images, processor)


def build_llava_next() -> Tiny:
    """LLaVA-1.6 in small: a Mistral decoder, 16 base tokens an image plus any-resolution tiles."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    text = MistralConfig(**_decoder_settings(len(tokenizer)), head_dim=16, sliding_window=None)
    config = LlavaNextConfig(
        vision_config=_vision_config(),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Tiny(LlavaNextForConditionalGeneration(config).eval(), tokenizer, images, processor)


def build_qwen2_vl() -> Tiny:
    """Qwen2-VL in small. No processor: its video half needs torchvision, which CPU wheels lack."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(
        vision_config=dict(
            depth=2, embed_dim=32, hidden_size=64, num_heads=2, patch_size=PATCH, mlp_ratio=2
        ),
        text_config=_decoder_settings(len(tokenizer)) | {"rope_parameters": rope},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    )
    return Tiny(Qwen2VLForConditionalGeneration(config).eval(), tokenizer, images)


@functools.cache
def build_text_model(
    kind: str = "llama",
    *,
    head_dim: int = 16,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    bias: bool = False,
    sliding_window: int | None = None,
    seed: int = 0,
) -> Tiny:
    """A tiny decoder without vision: `kind` is llama, mistral or qwen2.

    `bias` puts biases on LLaMA's projections (Qwen2 always has them, Mistral never); random, since
    zeros would hide a forgotten one. `sliding_window` holds for Mistral in all layers, for Qwen2
    in all but the first, so that full and window layers mix.
    """
    tokenizer = build_tokenizer()
    settings = _decoder_settings(len(tokenizer)) | dict(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    if kind == "llama":
        settings |= dict(attention_bias=bias)
    elif kind == "mistral":
        settings |= dict(sliding_window=sliding_window)
    else:
        settings |= dict(
            use_sliding_window=sliding_window is not None,
            sliding_window=sliding_window,
            max_window_layers=1,
        )
    config_class, model_class = TEXT_MODELS[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_(std=0.2)
    return Tiny(model, tokenizer)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last, so that a broken basic shows at once."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of all tiny models."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_llava() -> Tiny:
    """Shared: leave its weights as they are."""
    return build_llava()


@pytest.fixture(scope="session")
def tiny_llava_next() -> Tiny:
    """Shared: leave its weights as they are."""
    return build_llava_next()


@pytest.fixture(scope="session")
def tiny_qwen2_vl() -> Tiny:
    """Shared: leave its weights as they are."""
    return build_qwen2_vl()


@pytest.fixture(scope="session")
def tiny_text_model() -> Callable[..., Tiny]:
    """Factory, one model for each set of arguments; see `build_text_model`."""
    return build_text_model


@pytest.fixture(scope="session")
def tiny_llava_folder(tiny_llava: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA as a checkpoint folder; copy it before breaking it."""
    return tiny_llava.save(tmp_path_factory.mktemp("tiny_llava"))


@pytest.fixture(scope="session")
def tiny_llava_next_folder(tiny_llava_next: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA-NeXT as a checkpoint folder; copy it before breaking it."""
    return tiny_llava_next.save(tmp_path_factory.mktemp("tiny_llava_next"))


@pytest.fixture(scope="session")
def tiny_qwen2_vl_folder(tiny_qwen2_vl: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Qwen2-VL as a checkpoint folder; copy it before breaking it."""
    return tiny_qwen2_vl.save(tmp_path_factory.mktemp("tiny_qwen2_vl"))


@pytest.fixture(scope="session")
def tiny_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA as a checkpoint folder; copy it before breaking it."""
    return build_text_model("llama").save(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two drawn samples of two tasks, in MileBench's layout; not to be changed."""
    from kvbench.tasks.minimile import make

    root = tmp_path_factory.mktemp("drawn") / "data"
    make(root, samples=2, folders=("ObjectExistence", "WebQA"))
    return root


class OneBit:
    """Everything at one bit in groups of a whole head: little survives."""

    label, paper, needs = "1 bit", "-", Needs()

    def layer(self, spec: Any, calibration: Any) -> LayerQuantizer:
        codec = Affine(1, spec.head_dim)
        return LayerQuantizer(Side({1: codec}), Side({1: codec}), Uniform(1))


@pytest.fixture
def one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._builtin, "one_bit", (OneBit(), "a test"))
