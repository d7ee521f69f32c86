"""The zoo: which models kvbench knows, and the settings that belong to each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from kvbench.errors import UserError
from kvbench.models.prompts import STYLE_NAMES

Family = Literal["llava", "llava_next", "qwen2_vl", "text"]
ImageAspect = Literal["pad", "processor", "bounded"]
DType = Literal["float16", "bfloat16", "float32"]

_ASPECTS: dict[str, tuple[str, ...]] = {
    "llava": ("pad", "processor"),
    "llava_next": ("pad", "processor"),
    "qwen2_vl": ("bounded", "processor"),
    "text": ("processor",),
}


@dataclass(frozen=True)
class ModelEntry:
    """One model and how it is prompted.

    Attributes:
        name: Alias on the command line and in result rows.
        label: Name in tables, as the AKVQ-VL paper writes it.
        family: Architecture, which decides classes and input format.
        hub_id: Repository of the checkpoint, or None for a bundled model or a local folder.
        loader: `module:function` of a bundled model; called with (device, dtype), it returns
            (model, processor, revision).
        folder: Local checkpoint folder; wins over the other two.
        prompt_style: Name of a style in `kvbench.models.prompts`.
        tsa_layers: Layers whose attention favours text tokens (paper, Table I).
        max_context_len: Tokens that MileBench's truncation leaves room for.
        tokens_per_image: Tokens that MileBench's truncation counts for an image.
        image_aspect: `pad`: squares filled with the mean colour, one tile an image, as LLaVA's own
            `pad`; `processor`: whatever the checkpoint's image processor does (centre crop for
            LLaVA-1.5, any resolution for LLaVA-NeXT); `bounded`: Qwen2-VL's dynamic resolution,
            with at most `tokens_per_image` tokens an image.
        dtype: Weights' type unless the user asks for another.
    """

    name: str
    label: str
    family: Family
    hub_id: str | None = None
    loader: str | None = None
    folder: Path | None = None
    prompt_style: str = "llava_llama_2"
    tsa_layers: tuple[int, ...] = ()
    max_context_len: int = 4096
    tokens_per_image: int = 576
    image_aspect: ImageAspect = "pad"
    dtype: DType = "float16"

    def __post_init__(self) -> None:
        self._check("family", self.family, get_args(Family))
        self._check("image_aspect", self.image_aspect, _ASPECTS[self.family])
        self._check("prompt_style", self.prompt_style, STYLE_NAMES)
        self._check("dtype", self.dtype, get_args(DType))
        for field in ("max_context_len", "tokens_per_image"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} of model {self.name!r} must be at least 1")
        if any(layer < 0 for layer in self.tsa_layers):
            raise UserError(f"tsa_layers of model {self.name!r} must be layer numbers from 0")

    def _check(self, field: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise UserError(
                f"{field} of model {self.name!r} can't be {value!r}: choose {', '.join(allowed)}"
            )


MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        ModelEntry(
            "smol_llava",
            "smol-LLaVA",
            "llava",
            loader="kvbench.models.smol_llava:load",
            prompt_style="chatml",
            tsa_layers=(0, 1),
            tokens_per_image=64,
            dtype="bfloat16",
        ),
        ModelEntry(
            "smollm2",
            "SmolLM2-135M",
            "text",
            loader="kvbench.models.smol_llava:load_language",
            prompt_style="chatml",
            tsa_layers=(0, 1),
            max_context_len=8192,
            image_aspect="processor",
            dtype="bfloat16",
        ),
        ModelEntry(
            "llava15_7b",
            "LLaVA-v1.5-7B",
            "llava",
            hub_id="llava-hf/llava-1.5-7b-hf",
            tsa_layers=(0, 1),
        ),
        ModelEntry(
            "llava15_13b",
            "LLaVA-v1.5-13B",
            "llava",
            hub_id="llava-hf/llava-1.5-13b-hf",
            tsa_layers=(0, 1),
        ),
        ModelEntry(
            "llava16_vicuna",
            "LLaVA-v1.6-vicuna-7B",
            "llava_next",
            hub_id="llava-hf/llava-v1.6-vicuna-7b-hf",
            tsa_layers=(0, 1),
        ),
        ModelEntry(
            "llava16_mistral",
            "LLaVA-v1.6-mistral-7B",
            "llava_next",
            hub_id="llava-hf/llava-v1.6-mistral-7b-hf",
        ),
        ModelEntry(
            "qwen2vl_7b",
            "Qwen2-VL-7B",
            "qwen2_vl",
            hub_id="Qwen/Qwen2-VL-7B-Instruct",
            prompt_style="qwen2_vl",
            tsa_layers=(0, 1),
            image_aspect="bounded",
        ),
    )
}
