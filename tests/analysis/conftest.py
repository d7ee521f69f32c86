"""Layers made of random numbers, and tiny models with prompts of text and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kvbench.analysis.capture import LayerView
from kvbench.cache import LayerSpec, Needs
from kvbench.cache.observers import Observed
from kvbench.evaluation import choices
from kvbench.models.inputs import ModelInputs, encode
from kvbench.models.load import LoadedModel, load_model

MakeView = Callable[..., LayerView]


@pytest.fixture
def make_view() -> MakeView:
    """A layer of 4 heads on 2 key heads with random states; anything can be given instead."""

    def make(tokens: int = 50, dim: int = 8, seed: int = 0, **given: Any) -> LayerView:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        observed = Observed(Needs(), pre_rope=False)
        fields: dict[str, Any] = {
            "spec": LayerSpec(0, 1, 4, 2, dim),
            "query": 2 * normal(4, tokens, dim),
            "keys": normal(2, tokens, dim),
            "values": normal(2, tokens, dim),
            "residual": normal(tokens, 12),
            "scaling": dim**-0.5,
            "softcap": None,
            "mask": None,
            "observed": observed,
            "attend": lambda: normal(4, tokens, dim),
        }
        return LayerView(**fields | given)

    return make


@pytest.fixture(scope="session")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    """The tiny LLaVA, loaded as `eval` does; leave its weights as they are."""
    return load_model(choices.choose_models(f"tiny={tiny_llava_folder}")[0])


@pytest.fixture(scope="session")
def inputs(loaded: LoadedModel) -> ModelInputs:
    """A prompt with two images."""
    pictures = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green")]
    return encode(loaded, "First <ImageHere> and then <ImageHere> what is it?", pictures)
