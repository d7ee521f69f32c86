from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbench.errors import UserError
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.models.zoo import ModelEntry


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl"])
def test_loaded_weights_equal_the_saved_ones(request, name: str) -> None:
    loaded, saved = (request.getfixturevalue(n) for n in (name, f"tiny_{name}"))
    ours, theirs = loaded.model.state_dict(), saved.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert type(loaded.model) is type(saved.model) and not loaded.model.training


def test_loaded_parts(llava: LoadedModel, tiny_llava_folder: Path) -> None:
    assert llava.model.dtype == torch.float32
    assert llava.model.config._attn_implementation == "sdpa"
    assert llava.image_processor.crop_size["height"] == 56
    assert llava.tokenizer("a")["input_ids"] == [1, 73]
    assert (llava.pad_id, llava.max_positions) == (0, 4096)
    assert llava.path == tiny_llava_folder.resolve() and len(llava.revision) == 40


def test_text_model_has_no_image_processor(text_only: LoadedModel) -> None:
    assert text_only.image_processor is None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_as_asked(tiny_text_folder: Path, dtype: str | torch.dtype) -> None:
    loaded = load_model(find_model(f"mine={tiny_text_folder}"), dtype=dtype)
    assert loaded.model.dtype == torch.bfloat16


def test_unknown_dtype(tiny_text_folder: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype 'int7'"):
        load_model(find_model(f"mine={tiny_text_folder}"), dtype="int7")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unusable_device(tiny_text_folder: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}'"):
        load_model(find_model(f"mine={tiny_text_folder}"), device)


def test_missing_tensor_is_refused(tiny_llava_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("v_proj.weight") and "language" in key)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lack 1 tensors"):
        load_model(find_model(f"mine={folder}"))


def test_tensor_of_the_wrong_shape_is_refused(tiny_text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_text_folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(find_model(f"mine={folder}"))


def test_tied_output_weights_are_not_missing(tiny_text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_text_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(find_model(f"mine={folder}")).model
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_unreadable_processor_files(tiny_llava_folder: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))
    (folder / name).write_text("{")
    with pytest.raises(UserError, match="tokenizer or image processor"):
        load_model(find_model(f"mine={folder}"))


def image_processor_of(folder: Path, **settings: object) -> object:
    """The image processor when `preprocessor_config.json` holds `settings`, as on the hub."""
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 56} | settings))
    return load_model(find_model(f"mine={folder}")).image_processor


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("CLIPImageProcessor", "CLIPImageProcessorPil"),
        ("SiglipImageProcessorFast", "SiglipImageProcessorPil"),
        (None, "CLIPImageProcessorPil"),
    ],
)
def test_images_are_processed_by_pil(tiny_llava_folder, tmp_path, kind, expected) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))
    settings = {"image_processor_type": kind} if kind else {}
    assert type(image_processor_of(folder, **settings)).__name__ == expected


def test_unknown_image_processor(tiny_llava_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))
    with pytest.raises(UserError, match="unknown image processor BlurryImageProcessor"):
        image_processor_of(folder, image_processor_type="BlurryImageProcessor")


def test_code_in_a_checkpoint_is_not_run(tiny_text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_text_folder, tmp_path / "model"))
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": auto}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_model(find_model(f"mine={folder}"))
    assert not (tmp_path / "ran").exists()


def test_bundled_model_comes_from_its_loader(monkeypatch, tmp_path: Path) -> None:
    module = types.ModuleType("bundled_model")
    module.__file__ = str(tmp_path / "__init__.py")
    module.load = lambda device, dtype: (f"model on {device} as {dtype}", "processor", "r1")
    monkeypatch.setitem(sys.modules, "bundled_model", module)
    entry = ModelEntry("b", "B", "llava", loader="bundled_model:load", dtype="bfloat16")
    loaded = load_model(entry)
    assert loaded.model == "model on cpu as torch.bfloat16"
    assert (loaded.processor, loaded.revision, loaded.path) == ("processor", "r1", tmp_path)


def test_checkpoint_template_of_the_tokenizer(qwen2_vl: LoadedModel, restyled) -> None:
    style = restyled(qwen2_vl, prompt_style="processor").style
    assert style.render("A <ImageHere> B") == (
        "<|im_start|>user\nA <|vision_start|><|image_pad|><|vision_end|> B<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_checkpoint_template_of_an_older_processor(tiny_llava_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))
    template = (  # as in llava-hf's repositories: images first, then texts
        "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
        "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
        "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    entry = dataclasses.replace(find_model(f"mine={folder}"), prompt_style="processor")
    assert load_model(entry).style.render("A <ImageHere> B") == "USER: A <image> B ASSISTANT:"


def test_prompt_label_tells_style_and_image_treatment(llava: LoadedModel, restyled) -> None:
    assert re.fullmatch("llava_llama_2@[0-9a-f]{12}/pad", llava.prompt_label)
    assert restyled(llava, prompt_style="plain").prompt_label.startswith("plain@")
    assert restyled(llava, image_aspect="processor").prompt_label.endswith("/processor")


def test_no_template_at_all(llava: LoadedModel, restyled) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        _ = restyled(llava, prompt_style="processor").style
