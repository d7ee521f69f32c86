from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from kvbench.errors import UserError
from kvbench.models.find import find_model
from kvbench.models.folders import check_folder, checkpoint_folder, fingerprint, weight_files
from kvbench.models.zoo import MODELS


@pytest.fixture
def folder(tiny_llava_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLaVA's folder that may be broken."""
    return Path(shutil.copytree(tiny_llava_folder, tmp_path / "model"))


def shard(folder: Path) -> None:
    """Split the weights into two files with an index, as large checkpoints come."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, members in halves.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_complete_folder_passes(folder: Path) -> None:
    check_folder(folder, needs_images=True)
    assert weight_files(folder) == [folder / "model.safetensors"]


def test_complete_sharded_folder_passes(folder: Path) -> None:
    shard(folder)
    check_folder(folder, needs_images=True)
    assert [path.name for path in weight_files(folder)] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "config.json is missing"),
        ("model.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
        ("tokenizer.json", "tokenizer.json or tokenizer.model"),
        ("processor_config.json", "preprocessor_config.json or processor_config.json"),
    ],
)
def test_missing_file_is_named(folder: Path, removed: str, message: str) -> None:
    (folder / removed).unlink()
    with pytest.raises(UserError, match=message):
        check_folder(folder, needs_images=True)


def test_text_model_needs_no_image_processor(tiny_text_folder: Path) -> None:
    check_folder(tiny_text_folder, needs_images=False)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing"):
        check_folder(folder, needs_images=True)


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_broken_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="not a weight index"):
        check_folder(folder, needs_images=True)


def test_index_may_not_leave_the_folder(folder: Path) -> None:
    (folder.parent / "other.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"other\.safetensors"):
        check_folder(folder, needs_images=True)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_shortened_weights_are_noticed(folder: Path, kept: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_folder(folder, needs_images=True)


def test_fingerprint_is_stable_and_ignores_the_place(folder: Path, tiny_llava_folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(tiny_llava_folder)
    assert len(fingerprint(folder)) == 40


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_fingerprint_sees_changed_settings(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    (folder / name).write_text((folder / name).read_text() + " ")
    assert fingerprint(folder) != before


def test_fingerprint_sees_fine_tuned_weights_of_equal_shape(folder: Path) -> None:
    before = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v + 1e-3 for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert fingerprint(folder) != before


def test_fingerprint_of_a_hub_snapshot_is_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert fingerprint(tmp_path / "snapshots" / commit) == commit


def test_missing_checkpoint_says_what_to_download(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        checkpoint_folder(MODELS["llava16_mistral"])
    message = str(caught.value)
    assert "hf download llava-hf/llava-v1.6-mistral-7b-hf" in message
    assert "--models llava16_mistral=/folder" in message


def test_entry_with_folder_uses_it(folder: Path) -> None:
    assert checkpoint_folder(find_model(f"mine={folder}")) == folder.resolve()


def test_fingerprint_sees_the_last_byte(folder: Path) -> None:
    before = fingerprint(folder)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fingerprint(folder) != before
