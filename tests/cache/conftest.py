"""Left-padded batches for tiny models of every family, and exact caches to hold them against."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from kvbench.cache import LayerQuantizer, LayerSpec, kept_exact
from kvbench.registry import METHODS, configured, parse_spec

TEXT_FAMILIES = {
    "llama": dict(kind="llama"),
    "llama_mha_bias": dict(kind="llama", heads=4, kv_heads=4, bias=True),
    "mistral_window": dict(kind="mistral", sliding_window=9),
    "qwen2_mixed_windows": dict(kind="qwen2", layers=3, sliding_window=9),
}
VISION_FAMILIES = ("llava", "llava_next", "qwen2_vl")
FAMILIES = (*TEXT_FAMILIES, "qwen2_vl_text", *VISION_FAMILIES)
TEXTS = ["What is shown on the second picture, and where?", "hello there"]


@dataclass(frozen=True)
class Case:
    """A float64 model and the inputs of a batch of two rows, the second one shorter and padded."""

    model: Any
    inputs: dict[str, Tensor]
    tokenizer: Any

    def row(self, index: int) -> dict[str, Tensor]:
        """The inputs of one row alone, without padding."""
        keep = self.inputs["attention_mask"][index].bool()
        width = keep.numel()
        alone = {
            name: value[index : index + 1, keep]
            for name, value in self.inputs.items()
            if value.dim() == 2 and value.shape == (2, width)
        }
        images, name = {"llava": (3, 1), "llava_next": (3, 1), "qwen2_vl": (2, 1)}, family(self)
        if "pixel_values" not in self.inputs:
            return alone
        start, stop = (0, images[name][0]) if index == 0 else (images[name][0], sum(images[name]))
        if name == "qwen2_vl":
            patches = self.inputs["image_grid_thw"].prod(1).tolist()
            first, last = sum(patches[:start]), sum(patches[:stop])
            alone["pixel_values"] = self.inputs["pixel_values"][first:last]
            alone["image_grid_thw"] = self.inputs["image_grid_thw"][start:stop]
            return alone
        alone["pixel_values"] = self.inputs["pixel_values"][start:stop]
        if "image_sizes" in self.inputs:
            alone["image_sizes"] = self.inputs["image_sizes"][start:stop]
        return alone


def family(case: Case) -> str:
    return str(case.model.config.model_type)


def _double(model: Any) -> Any:
    """A float64 copy: sums in another order then can't tip a code over."""
    copied = type(model)(copy.deepcopy(model.config)).double().eval()
    copied.load_state_dict(model.state_dict())
    return copied


def _images(count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(count)
    ]


def _llava(tiny: Any) -> dict[str, Tensor]:
    texts = ["One <image> two <image> three <image> " + TEXTS[0], "<image> " + TEXTS[1]]
    images = _images(4)
    return dict(
        tiny.processor(
            images=[images[:3], images[3:]], text=texts, padding=True, return_tensors="pt"
        )
    )


def _qwen2_vl(tiny: Any) -> dict[str, Tensor]:
    pixels = tiny.image_processor(_images(3), return_tensors="pt")
    tokens = (pixels["image_grid_thw"].prod(1) // 4).tolist()
    shown = ["<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in tokens]
    texts = [f"One {shown[0]} two {shown[1]} " + TEXTS[0], shown[2] + TEXTS[1]]
    inputs = dict(tiny.tokenizer(texts, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    vision = inputs["input_ids"] == tiny.model.config.image_token_id
    return inputs | dict(pixels) | {"mm_token_type_ids": vision.int()}


@pytest.fixture(scope="session")
def case(request: pytest.FixtureRequest) -> Callable[[str], Case]:
    """Family -> model and batch."""
    known: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in known:
            known[name] = build(name)
        return known[name]

    def build(name: str) -> Case:
        if name in TEXT_FAMILIES:
            tiny = request.getfixturevalue("tiny_text_model")(**TEXT_FAMILIES[name])
        else:
            tiny = request.getfixturevalue("tiny_" + name.removesuffix("_text"))
        if name in VISION_FAMILIES:
            inputs = _qwen2_vl(tiny) if name == "qwen2_vl" else _llava(tiny)
        else:
            inputs = dict(tiny.tokenizer(TEXTS, padding=True, return_tensors="pt"))
            inputs.pop("token_type_ids", None)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        return Case(_double(tiny.model), inputs, tiny.tokenizer)

    return make


@dataclass(frozen=True)
class Exactly:
    """A method's own transforms, windows and RoPE handling, but every token stays exact."""

    inner: Any

    @property
    def label(self) -> str:
        return f"exact {self.inner.label}"

    @property
    def paper(self) -> str:
        return "-"

    @property
    def needs(self) -> Any:
        return self.inner.needs

    def layer(self, spec: LayerSpec, calibration: Any) -> LayerQuantizer:
        return kept_exact(self.inner.layer(spec, calibration))


@pytest.fixture(scope="session")
def exactly() -> Callable[[str], Any]:
    """A method (name with parameters) that keeps all tokens exact in its own basis."""

    def make(text: str) -> Any:
        name, parameters = parse_spec(text)
        return Exactly(configured(METHODS.get(name), parameters))

    return make


@pytest.fixture(scope="session")
def greedy() -> Callable[..., Any]:
    """`generate` without sampling, with logits."""

    def run(
        model: nn.Module, inputs: dict[str, Tensor], cache: Any, tokens: int = 10, **more: Any
    ) -> Any:
        torch.manual_seed(0)
        return model.generate(  # type: ignore[operator]
            **inputs,
            past_key_values=cache,
            **dict(
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            | more,
        )

    return run


@pytest.fixture(scope="session")
def distance() -> Callable[[Any, Any], float]:
    """Largest difference between the logits of two calls of `generate`."""

    def measure(one: Any, other: Any) -> float:
        assert len(one.logits) == len(other.logits)
        pairs = zip(one.logits, other.logits, strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    return measure
