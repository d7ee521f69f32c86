"""Models by shape: published parameter counts, and random models that are whole."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvbench.errors import UserError
from kvbench.models.architectures import ARCHITECTURES, configuration, random_model
from kvbench.models.find import find_model
from kvbench.registry import MODELS

# As the hub counts the checkpoints' tensors; 13B after vicuna-13b with 32,064 tokens.
PUBLISHED = {
    "llava15_7b": 7_063_427_072,
    "llava15_13b": 13_351_494_656,
    "llava16_vicuna": 7_063_431_168,
    "llava16_mistral": 7_566_747_648,
    "qwen2vl_7b": 8_291_375_616,
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(
            configuration(MODELS.get(name)), dtype=torch.float16
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PUBLISHED[name]


def test_every_hub_model_has_a_shape() -> None:
    hub = [name for name in MODELS.names() if MODELS.get(name).hub_id is not None]
    assert sorted(ARCHITECTURES) == sorted(hub) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_decoders(name: str) -> None:
    text = configuration(MODELS.get(name)).get_text_config(decoder=True)
    layers, hidden, heads, kv_heads, theta = {
        "llava15_7b": (32, 4096, 32, 32, 1e4),
        "llava15_13b": (40, 5120, 40, 40, 1e4),
        "llava16_vicuna": (32, 4096, 32, 32, 1e4),
        "llava16_mistral": (32, 4096, 32, 8, 1e6),
        "qwen2vl_7b": (28, 3584, 28, 4, 1e6),
    }[name]
    assert (text.num_hidden_layers, text.hidden_size) == (layers, hidden)
    assert (text.num_attention_heads, text.num_key_value_heads) == (heads, kv_heads)
    assert text.rope_parameters["rope_theta"] == theta
    assert getattr(text, "sliding_window", None) is None


def config_only(folder: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    return target


@pytest.mark.parametrize("kind", ["llava", "llava_next", "qwen2_vl", "text"])
def test_random_models_equal_loaded_ones_but_for_weights(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder = request.getfixturevalue(f"tiny_{kind}_folder")
    entry = find_model(f"tiny={config_only(folder, tmp_path / 'only')}")
    model = random_model(entry, "cpu", torch.float32)
    auto = "CausalLM" if kind == "text" else "ImageTextToText"
    loaded = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(folder)
    assert type(model) is type(loaded)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    shapes = {name: tensor.shape for name, tensor in loaded.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == shapes
    expected = dict(loaded.named_buffers())
    assert expected, "rotary frequencies at least"
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected.pop(name)), name
    assert not expected


def test_random_weights(tiny_llava_folder: Path) -> None:
    entry = find_model(f"tiny={tiny_llava_folder}")
    before = torch.get_rng_state()
    one, same, other = (random_model(entry, "cpu", torch.float16, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = dict(same.named_parameters())
    for name, weight in one.named_parameters():
        assert weight.dtype == torch.float16 and weight.isfinite().all(), name
        assert torch.equal(weight, weights[name]), name
        if "norm" in name and name.endswith("weight"):
            assert (weight == 1).all(), name
    head = [model.lm_head.weight for model in (one, other)]
    assert not torch.equal(*head)
    assert head[0].float().std().item() == pytest.approx(0.2, rel=0.05)  # its initializer_range
    ids = torch.tensor([[1, 9, 30, 77]])
    assert one.float()(input_ids=ids).logits.isfinite().all()


def test_a_model_of_no_known_shape() -> None:
    entry = dataclasses.replace(MODELS.get("llava15_7b"), name="mine")
    with pytest.raises(UserError, match=r"shapes of mine are not known: .* mine=/folder"):
        configuration(entry)


def test_a_broken_configuration(tmp_path: Path, tiny_llava_folder: Path) -> None:
    entry = find_model(f"tiny={config_only(tiny_llava_folder, tmp_path / 'only')}")
    (tmp_path / "only" / "config.json").write_text('{"model_type": "llava", "text_config": 3}')
    with pytest.raises(UserError, match=r"config\.json can't be read"):
        configuration(entry)
