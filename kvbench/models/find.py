"""From typed text to a model's entry: `llava15_7b`, `llava15_7b=/folder`, `mine=/folder`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_args

from kvbench.errors import UserError
from kvbench.models.zoo import DType, Family, ImageAspect, ModelEntry
from kvbench.registry import MODELS, configured, parse_spec

_TYPED = re.compile(r"(?P<spec>[\w.-]+(\[[^\]]*\])?)(=(?P<folder>.+))?")
_FAMILIES: dict[str, Family] = {
    "llava": "llava",
    "llava_next": "llava_next",
    "qwen2_vl": "qwen2_vl",
    "llama": "text",
    "mistral": "text",
    "qwen2": "text",
}
_DEFAULTS: dict[Family, tuple[str, ImageAspect]] = {
    "llava": ("llava_llama_2", "pad"),
    "llava_next": ("llava_llama_2", "pad"),
    "qwen2_vl": ("qwen2_vl", "bounded"),
    "text": ("plain", "processor"),
}


def find_model(text: str) -> ModelEntry:
    """Return the entry for `alias`, `alias[field=value,...]`, either followed by `=folder`.

    An alias of the zoo keeps its settings and takes its weights from the folder. An alias that the
    zoo does not know gets settings by the family that the folder's config.json names.

    Raises:
        UserError: The text can't be read, the alias is unknown and comes without a folder, the
            folder is missing, or holds a model of another or an unknown family.
    """
    match = _TYPED.fullmatch(text.strip())
    if match is None:
        raise UserError(
            f"can't read the model {text!r}: write alias, alias[field=value,...] or alias=/folder"
        )
    name, parameters = parse_spec(match["spec"])
    if match["folder"] is None:
        return configured(MODELS.get(name), parameters)
    folder = Path(match["folder"]).expanduser().resolve()
    if name not in MODELS.names():
        return configured(_entry_of(name, folder), parameters)
    entry = MODELS.get(name)
    found = _family(folder, read_config(folder))
    if found != entry.family:
        raise UserError(
            f"{folder} holds a model of family {found}, but {name} is {entry.family}:"
            " give the right folder, or an alias that is not in the zoo"
        )
    return configured(dataclasses.replace(entry, folder=folder, loader=None), parameters)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a checkpoint folder.

    Raises:
        UserError: The folder or the file is missing, or the file is not a JSON object.
    """
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}: check the path")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: the model folder is incomplete, download it again")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return config


def _family(folder: Path, config: dict[str, Any]) -> Family:
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise UserError(
            f"{folder / 'config.json'} names the model type {kind!r}:"
            f" kvbench runs {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[kind]


def _entry_of(name: str, folder: Path) -> ModelEntry:
    """An entry for a folder under a name of the user's own."""
    config = read_config(folder)
    family = _family(folder, config)
    style, aspect = _DEFAULTS[family]
    text = config.get("text_config") or config
    dtype: Any = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    return ModelEntry(
        name,
        name,
        family,
        folder=folder,
        prompt_style=style,
        max_context_len=min(4096, int(text.get("max_position_embeddings") or 4096)),
        tokens_per_image=_tokens_per_image(config),
        image_aspect=aspect,
        dtype=dtype if dtype in get_args(DType) else "float32",
    )


def _tokens_per_image(config: dict[str, Any]) -> int:
    """Patches of one square tile; 576 where the vision tower has no fixed size, as in Qwen2-VL."""
    vision = config.get("vision_config") or {}
    size, patch = vision.get("image_size"), vision.get("patch_size")
    return (int(size) // int(patch)) ** 2 if size and patch else 576
