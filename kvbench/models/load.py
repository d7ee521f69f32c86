"""Loading a model of the zoo, from local files only."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvbench.errors import UserError
from kvbench.models import AUTO_MAP
from kvbench.models.folders import checkpoint_folder, fingerprint
from kvbench.models.prompts import CHECKPOINT, STYLES, PromptStyle, checkpoint_style
from kvbench.models.tokens import TextTokens
from kvbench.models.vision import allow_single_tiles
from kvbench.models.zoo import ModelEntry

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "text": "AutoModelForCausalLM",
}
_IMAGE_PROCESSORS = {  # where the checkpoint's file doesn't say
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
}


@dataclass(frozen=True)
class Processor:
    """What turns text and images into numbers.

    transformers' own processor classes are not used: Qwen2-VL's needs torchvision for videos, and
    all of them tokenize a prompt in one go where LLaVA's own code does so piece by piece.
    """

    tokenizer: Any
    image_processor: Any = None
    chat_template: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with all that belongs to it.

    Attributes:
        model: The transformers model, on its device, attention `sdpa`.
        processor: Object with `tokenizer` and, for models with vision, `image_processor`.
        entry: The zoo's entry it was loaded by.
        revision: Hub commit or content fingerprint; changes whenever the weights do.
        path: Folder that the files came from.
    """

    model: Any
    processor: Any
    entry: ModelEntry
    revision: str
    path: Path

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; for a bare tokenizer given as processor, that."""
        return getattr(self.processor, "tokenizer", self.processor)

    @cached_property
    def tokens(self) -> TextTokens:
        """Token ids of plain text and back."""
        return TextTokens(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the embeddings' device, which is not every layer's with `auto-map`."""
        embeddings = self.model.get_input_embeddings()
        hook = getattr(embeddings, "_hf_hook", None)  # of accelerate: weights may be elsewhere
        device = getattr(hook, "execution_device", None)
        return embeddings.weight.device if device is None else torch.device(device)

    @property
    def image_processor(self) -> Any:
        """The image processor, or None for a model without vision."""
        return getattr(self.processor, "image_processor", None)

    @property
    def pad_id(self) -> int:
        """Token id to pad with; padding is masked, so the end-of-sequence token does as well."""
        tokenizer = self.tokenizer
        return int(
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )

    @property
    def max_positions(self) -> int:
        """Length of the sequences that the language model was made for, in tokens."""
        return int(self.model.config.get_text_config(decoder=True).max_position_embeddings)

    @property
    def style(self) -> PromptStyle:
        """The entry's prompt style.

        Raises:
            UserError: The style is `processor` and the checkpoint has no chat template.
        """
        if self.entry.prompt_style != CHECKPOINT:
            return STYLES[self.entry.prompt_style]
        template = getattr(self.processor, "chat_template", None) or self.tokenizer.chat_template
        if not template:
            raise UserError(
                f"{self.entry.name} has no chat template: choose another prompt style"
                f" ({', '.join(STYLES)})"
            )

        def apply(messages: list[dict[str, object]]) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            )

        return checkpoint_style(apply, qwen=self.entry.family == "qwen2_vl")

    @property
    def prompt_label(self) -> str:
        """Prompt style and treatment of images, as result rows carry them: `chatml@0a1b2c/pad`."""
        return f"{self.style.label}/{self.entry.image_aspect}"


def load_model(
    entry: ModelEntry, device: str = "cpu", dtype: torch.dtype | str | None = None
) -> LoadedModel:
    """Load a model with its tokenizer and image processor; nothing is downloaded.

    Args:
        entry: What to load.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto-map`: the layers of a checkpoint are spread
            over all GPUs, and main memory if they are full, as accelerate does it.
        dtype: Weights' type, the entry's if None.

    Raises:
        UserError: The checkpoint is not on this machine, is incomplete or does not fit its
            architecture, the device is not there, or the type is unknown.
    """
    kind = _dtype(dtype or entry.dtype)
    if device != AUTO_MAP:
        _check_device(device)
    if entry.folder is None and entry.loader is not None:
        return _load_bundled(entry, device, kind)
    folder = checkpoint_folder(entry)
    processor = _processor(folder, entry)
    model = _weights(folder, entry, kind, device).eval()
    if entry.family == "llava_next":
        allow_single_tiles(model)
    return LoadedModel(model, processor, entry, fingerprint(folder), folder)


def _load_bundled(entry: ModelEntry, device: str, dtype: torch.dtype) -> LoadedModel:
    if device == AUTO_MAP:  # small enough for one
        device = "cuda" if torch.cuda.is_available() else "cpu"
    module_name, _, function = str(entry.loader).partition(":")
    # A plug-in's loader is foreign code: what goes wrong in it must name it.
    try:
        module = importlib.import_module(module_name)
        model, processor, revision = getattr(module, function)(device, dtype)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the loader {entry.loader} of model {entry.name!r} failed "
            f"({type(error).__name__}: {error}): it must be a function module:name that takes "
            "(device, dtype) and returns (model, processor, revision)"
        ) from error
    return LoadedModel(model, processor, entry, revision, Path(str(module.__file__)).parent)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"device {device!r} can't be used ({reason}): choose cpu or another one"
        ) from None


def _processor(folder: Path, entry: ModelEntry) -> Processor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        images = _image_processor(folder, entry) if entry.family != "text" else None
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise UserError(f"can't read tokenizer or image processor in {folder}: {error}") from error
    return Processor(tokenizer, images, _processor_template(folder))


def _image_processor(folder: Path, entry: ModelEntry) -> Any:
    """The image processor by PIL, whose resizing is the same on every machine.

    The class is looked up here because transformers' automatic choice may demand torchvision.
    """
    import transformers

    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    else:
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")).get("image_processor", {})
    name = settings.get("image_processor_type", _IMAGE_PROCESSORS[entry.family])
    name = name.removesuffix("Fast").removesuffix("Pil") + "Pil"
    if not hasattr(transformers, name):
        raise ValueError(f"{path} names the unknown image processor {name.removesuffix('Pil')}")
    return getattr(transformers, name).from_pretrained(folder, local_files_only=True)


def _processor_template(folder: Path) -> str | None:
    """The chat template of older processors, in a file that tokenizers do not read."""
    path = folder / "chat_template.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no chat template: download it again") from None


def _device_map(device: str) -> dict[str, str] | str | None:
    """What transformers is told of where to put which layer; None where one device has all."""
    return "auto" if device == AUTO_MAP else None


def _weights(folder: Path, entry: ModelEntry, dtype: torch.dtype, device: str) -> Any:
    import transformers

    places = _device_map(device)
    try:
        model, report = getattr(transformers, _CLASSES[entry.family]).from_pretrained(
            folder,
            dtype=dtype,
            device_map=places,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the model in {folder} can't be loaded: {error}") from error
    # transformers only warns about these and fills them with random numbers.
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"the weights in {folder} lack {len(missing)} tensors, such as {missing[0]}:"
            " download the checkpoint again"
        )
    if places is None:
        return model.to(device)
    if "disk" in getattr(model, "hf_device_map", {}).values():  # absent without any GPU
        raise UserError(
            f"the model in {folder} is larger than all GPUs and main memory together: use a smaller"
            " dtype, or a larger machine"
        )
    return model
