"""Tiny models as `load_model` returns them, and images of given sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model


@pytest.fixture(scope="session")
def llava(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_llava_folder}"))


@pytest.fixture(scope="session")
def llava_next(tiny_llava_next_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_llava_next_folder}"))


@pytest.fixture(scope="session")
def qwen2_vl(tiny_qwen2_vl_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_qwen2_vl_folder}"))


@pytest.fixture(scope="session")
def text_only(tiny_text_folder: Path) -> LoadedModel:
    return load_model(find_model(f"mine={tiny_text_folder}"))


@pytest.fixture
def noise() -> Callable[..., Image.Image]:
    """noise(width, height, seed): an RGB image of random pixels."""

    def make(width: int, height: int, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture
def restyled() -> Callable[..., LoadedModel]:
    """restyled(loaded, prompt_style="plain"): the same model under a changed entry."""

    def change(loaded: LoadedModel, **fields: object) -> LoadedModel:
        return dataclasses.replace(loaded, entry=dataclasses.replace(loaded.entry, **fields))

    return change
