from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.models.find import find_model
from kvbench.models.zoo import MODELS, ModelEntry

# Table I of arXiv 2501.15021: text-salient layers.
TSA = {
    "llava15_7b": (0, 1),
    "llava15_13b": (0, 1),
    "llava16_vicuna": (0, 1),
    "llava16_mistral": (),
    "qwen2vl_7b": (0, 1),
}


def test_text_salient_layers_are_those_of_the_paper() -> None:
    assert {name: MODELS[name].tsa_layers for name in TSA} == TSA


def test_importing_the_zoo_leaves_torch_alone() -> None:
    code = "import sys, kvbench.models.find as f; f.find_model('smol_llava'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize("entry", [e for e in MODELS.values() if e.loader], ids=lambda e: e.name)
def test_bundled_loaders_exist(entry: ModelEntry) -> None:
    module, _, function = entry.loader.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("family", "blip"),
        ("image_aspect", "bounded"),
        ("prompt_style", "alpaca"),
        ("dtype", "int8"),
        ("max_context_len", 0),
        ("tokens_per_image", -1),
        ("tsa_layers", (-1,)),
    ],
)
def test_bad_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(UserError, match=field):
        ModelEntry("x", "x", **({"family": "llava"} | {field: value}))


def test_alias() -> None:
    assert find_model(" llava15_7b ") is MODELS["llava15_7b"]


def test_alias_with_settings() -> None:
    entry = find_model("llava15_7b[prompt_style=vicuna_v1,max_context_len=2048]")
    assert (entry.prompt_style, entry.max_context_len) == ("vicuna_v1", 2048)
    assert entry.tsa_layers == (0, 1)


def test_unknown_alias_suggests() -> None:
    with pytest.raises(UserError, match="did you mean llava15_7b"):
        find_model("lava15_7b")


def test_bad_setting_of_an_alias() -> None:
    with pytest.raises(UserError, match="prompt_style"):
        find_model("llava15_7b[prompt_style=alpaca]")


@pytest.mark.parametrize("text", ["", "=/folder", "a b", "llava15_7b[dtype=float32", "a/../b=/x"])
def test_unreadable_text(text: str) -> None:
    with pytest.raises(UserError, match="write alias"):
        find_model(text)


def test_known_alias_with_folder_keeps_its_settings(tiny_llava_folder: Path) -> None:
    entry = find_model(f"llava15_13b[dtype=float32]={tiny_llava_folder}")
    assert (entry.name, entry.label) == ("llava15_13b", "LLaVA-v1.5-13B")
    assert (entry.folder, entry.dtype, entry.tokens_per_image) == (
        tiny_llava_folder.resolve(),
        "float32",
        576,
    )


def test_folder_replaces_a_bundled_model(tiny_llava_folder: Path) -> None:
    entry = find_model(f"smol_llava={tiny_llava_folder}")
    assert entry.loader is None and entry.folder == tiny_llava_folder.resolve()


def test_known_alias_with_another_family_is_refused(tiny_llava_folder: Path) -> None:
    with pytest.raises(UserError, match="family llava, but qwen2vl_7b is qwen2_vl"):
        find_model(f"qwen2vl_7b={tiny_llava_folder}")


@pytest.mark.parametrize(
    ("fixture", "family", "style", "aspect", "tokens"),
    [
        ("tiny_llava_folder", "llava", "llava_llama_2", "pad", 16),
        ("tiny_llava_next_folder", "llava_next", "llava_llama_2", "pad", 16),
        ("tiny_qwen2_vl_folder", "qwen2_vl", "qwen2_vl", "bounded", 576),
        ("tiny_text_folder", "text", "plain", "processor", 576),
    ],
)
def test_own_alias_takes_the_family_from_config(
    request, fixture: str, family: str, style: str, aspect: str, tokens: int
) -> None:
    entry = find_model(f"mine={request.getfixturevalue(fixture)}")
    assert (entry.name, entry.family, entry.prompt_style) == ("mine", family, style)
    assert (entry.image_aspect, entry.tokens_per_image) == (aspect, tokens)
    assert (entry.dtype, entry.tsa_layers, entry.max_context_len) == ("float32", (), 4096)


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "llama"])
def test_text_decoders_are_known(tmp_path: Path, kind: str) -> None:
    config = {"model_type": kind, "max_position_embeddings": 512, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = find_model(f"mine={tmp_path}")
    assert (entry.family, entry.max_context_len, entry.dtype) == ("text", 512, "bfloat16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        ("{", "not valid JSON"),
        ("[]", "no JSON object"),
        ('{"model_type": "bert"}', "model type 'bert'"),
        ("{}", "model type None"),
    ],
)
def test_bad_config_of_a_folder(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_model(f"mine={tmp_path}")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model folder"):
        find_model(f"llava15_7b={tmp_path / 'gone'}")
