"""Checkpoint folders: found in the hub's cache, checked for completeness, identified by content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from kvbench.errors import UserError
from kvbench.models.find import read_config
from kvbench.models.zoo import ModelEntry

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def checkpoint_folder(entry: ModelEntry) -> Path:
    """Return the complete local folder of a model that is not bundled; nothing is downloaded.

    Raises:
        UserError: The checkpoint is not on this machine, or its folder is incomplete or damaged.
    """
    folder = entry.folder or _cached_snapshot(entry)
    check_folder(folder, needs_images=entry.family != "text")
    return folder


def _cached_snapshot(entry: ModelEntry) -> Path:
    """The newest snapshot of the entry's repository in the local hub cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if entry.hub_id is None:
        raise UserError(
            f"model {entry.name!r} has neither hub id nor folder: write {entry.name}=/folder"
        )
    try:
        return Path(snapshot_download(entry.hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        raise UserError(
            f"the checkpoint of {entry.name} is not on this machine: download it with"
            f" `hf download {entry.hub_id}`, or put it in a folder and write"
            f" --models {entry.name}=/folder"
        ) from None


def check_folder(folder: Path, *, needs_images: bool) -> None:
    """Check that a checkpoint folder holds all that loading needs, without reading the weights.

    Raises:
        UserError: A file is missing, cut short or unreadable; the message names it.
    """
    read_config(folder)
    for shard in weight_files(folder):
        _header(shard)
    _require_one(folder, _TOKENIZERS, "the tokenizer")
    if needs_images:
        _require_one(folder, _IMAGE_PROCESSORS, "the image processor's settings")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the weights, sorted by name.

    Raises:
        UserError: There are none, or a shard listed in the index is missing.
    """
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise UserError(
                f"{folder} holds neither {_SINGLE} nor {_INDEX}: only safetensors weights are read,"
                " download those"
            )
        return [folder / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is not a weight index: download it again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but {_INDEX} lists it: download it again")
    return [folder / name for name in names]


def fingerprint(folder: Path) -> str:
    """Identify a checkpoint: its hub commit, or 40 hex digits of a hash over its content.

    The hash covers all JSON, template and tokenizer files and, of each weight file, the size, the
    header and 64 samples of 4 KiB, so that a fine-tuned copy differs and yet it takes milliseconds.
    """
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    digest = hashlib.sha256()
    small = (p for p in folder.iterdir() if p.suffix in (".json", ".jinja", ".model"))
    for path in sorted(small):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        digest.update(path.read_bytes())
    for path in weight_files(folder):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        for piece in _samples(path):
            digest.update(piece)
    return digest.hexdigest()[:40]


def _require_one(folder: Path, names: tuple[str, ...], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} lacks {' or '.join(names)} ({what}): download the missing file")


def _header(path: Path) -> bytes:
    """Return the JSON header of a safetensors file, having checked the file's length against it.

    Format: 8 bytes little-endian header length, the header, then the tensors' bytes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= size - 8 else b""
    try:
        tensors = json.loads(header)
        end = max(t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} is not a readable safetensors file: download it again") from None
    if size != 8 + length + end:
        raise UserError(f"{path} has {size} bytes instead of {8 + length + end}: download it again")
    return header


def _samples(path: Path) -> Iterator[bytes]:
    yield _header(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            yield file.read(_SAMPLE_BYTES)
