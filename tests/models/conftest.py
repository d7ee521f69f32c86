"""Tiny models as `load_model` returns them, and images of given sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def llava(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_llava_folder}"))


@pytest.fixture(scope="session")
def llava_next(tiny_llava_next_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_llava_next_folder}"))


@pytest.fixture(scope="session")
def qwen2_vl(tiny_qwen2_vl_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_qwen2_vl_folder}"))


@pytest.fixture(scope="session")
def text_only(tiny_text_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_text_folder}"))


@pytest.fixture
def noise() -> Callable[..., Image.Image]:
    """noise(width, height, seed): an RGB image of random pixels."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def restyled() -> Callable[..., LoadedModel]:
    """restyled(loaded, prompt_style="plain"): the same model under a changed entry."""

    def change(loaded: LoadedModel, **fields: object) -> LoadedModel:
        return dataclasses.replace(loaded, entry=dataclasses.replace(loaded.entry, **fields))

    return change


@pytest.fixture(params=["prepend", "metaspace"])
def sentencepiece_like(request) -> PreTrainedTokenizerFast:
    """One token a letter, `▁` for a blank and before every text; no start token.

    `prepend` is what LLaMA's files on the hub say, `metaspace` what transformers makes of them.
    """
    symbols = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "▁", "a", "b", "\n"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    if request.param == "prepend":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
