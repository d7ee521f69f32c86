"""Registered methods in small, their calibration, and a layer that is driven without a model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kvbench.cache import (
    Calibration,
    KVQuantizer,
    LayerSpec,
    Needs,
    bind,
    calibrate_statistics,
)
from kvbench.cache.layer import QuantizedLayer
from kvbench.cache.observers import Observed
from kvbench.registry import METHODS

SMALL = dict(
    **dict(recent=8, window=8, residual=16, group_size=8, pivots=3, sinks=2, skip_layers=0),
    **dict(stream=8, start=2, keep=0.5, recent_probes=8, random_probes=8),
)
"""Windows and groups that a prompt of some fifty tokens fills several times."""


TWINS = {"turboquant_4bit_nc", "turboquant_3bit_nc"}
"""Presets that differ from another one in numbers alone."""


def quantizer_names() -> list[str]:
    """Registered methods that kvbench stores itself, without twins."""
    names = (name for name in METHODS.names() if name not in TWINS)
    return [name for name in names if isinstance(METHODS.get(name), KVQuantizer)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`quantizer_name`: every registered method that kvbench stores; `lossy_name`: all but fp16."""
    if "quantizer_name" in metafunc.fixturenames:
        metafunc.parametrize("quantizer_name", quantizer_names())
    if "lossy_name" in metafunc.fixturenames:
        lossy = [name for name in quantizer_names() if name != "fp16"]
        metafunc.parametrize("lossy_name", lossy)


@pytest.fixture(scope="session")
def small() -> Callable[[str], Any]:
    """A registered method with the windows and groups of `SMALL`, where it has such fields."""

    def make(name: str) -> Any:
        method: Any = METHODS.get(name)
        known = {field.name for field in dataclasses.fields(method)}
        values = {key: value for key, value in SMALL.items() if key in known}
        return dataclasses.replace(method, **values)

    return make


@pytest.fixture(scope="session")
def calibrated() -> Callable[[Any], Calibration]:
    """Statistics of a model on two text prompts, collected once a model."""
    known: dict[int, tuple[Any, Calibration]] = {}

    def make(model: Any) -> Calibration:
        if id(model) not in known:
            ids = (torch.arange(20, 80)[None], torch.arange(60, 160, 2)[None])
            prompts = [{"input_ids": one.to(model.device)} for one in ids]
            known[id(model)] = model, calibrate_statistics(model, prompts, {"data": "two prompts"})
        return known[id(model)][1]

    return make


@pytest.fixture(scope="session")
def double() -> Callable[[Any], Any]:
    """A float64 copy of a model: sums in another order then can't tip a code over."""
    known: dict[int, Any] = {}

    def make(model: Any) -> Any:
        if id(model) not in known:
            copied = type(model)(copy.deepcopy(model.config)).double().eval()
            copied.load_state_dict(model.state_dict())
            known[id(model)] = copied
        return known[id(model)]

    return make


@pytest.fixture(scope="session")
def llava_inputs() -> Callable[[Any], dict[str, Tensor]]:
    """Three images in one row, one in the other, which is shorter and padded."""

    def make(tiny: Any) -> dict[str, Tensor]:
        noise = np.random.default_rng(0)
        images = [
            Image.fromarray(noise.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(4)
        ]
        texts = ["One <image> two <image> three <image> which is red?", "<image> and this?"]
        inputs = tiny.processor(
            images=[images[:3], images[3:]], text=texts, padding=True, return_tensors="pt"
        )
        return dict(inputs) | {"pixel_values": inputs["pixel_values"].double()}

    return make


class Driver:
    """One quantized layer fed with chosen states, as a model's attention module would."""

    def __init__(self, method: Any, spec: LayerSpec, protocol: str, **more: Any) -> None:
        needs = getattr(method, "needs", Needs())
        quantizer = method.layer(spec, more.get("calibration"))
        self.observed = Observed(needs, quantizer.key.pre_rope)
        self.layer = QuantizedLayer(quantizer, spec, protocol, self.observed)  # type: ignore[arg-type]
        self.spec, self.rotary, self.seen = spec, more.get("rotary"), 0
        groups = spec.num_heads // spec.num_kv_heads
        self.module = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)

    def step(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        vision: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Attention output (B, Hq, n, D) of one forward call; states are (B, heads, n, D)."""
        rows, _, new, width = keys.shape
        self.observed.valid = torch.ones(rows, new, dtype=torch.bool)
        self.observed.is_vision = vision
        if residual is not None:
            self.observed.residual[self.spec.index] = residual
        if self.rotary is not None:
            ids = torch.arange(self.seen, self.seen + new).expand(rows, new)
            self.observed.rotary.append(self.rotary, ids)
        stored, _ = self.layer.update(keys, values)
        self.seen += new
        return self.layer.attend(self.module, query, stored, None, width**-0.5)  # type: ignore[arg-type]

    def packed(self) -> dict[str, list[Tensor]]:
        """Packed tensors by side and bits."""
        return {
            f"{name}{bits}": [part.data for part in segment.parts]
            for name, store in (("key", self.layer.key_store), ("value", self.layer.value_store))
            for bits, segment in store.segments.items()
            if segment.parts
        }


@pytest.fixture(scope="session")
def driver() -> type[Driver]:
    """The class `Driver`."""
    return Driver


@pytest.fixture(scope="session")
def random_states() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Query, keys and values for a whole sequence, float32."""

    def make(
        tokens: int,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 16,
        rows: int = 1,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        query = torch.randn(rows, heads, tokens, width, generator=source)
        keys = torch.randn(rows, kv_heads, tokens, width, generator=source) * 2 + 0.5
        values = torch.randn(rows, kv_heads, tokens, width, generator=source)
        return query, keys, values

    return make


@pytest.fixture(scope="session")
def caches(calibrated: Any) -> Callable[..., Any]:
    """A cache of a model with the model's own calibration where the method needs one."""

    def make(
        model: Any, method: Any, protocol: Any = "quantized_prefill", calibration: Any = None
    ) -> Any:
        if method.needs.statistics and calibration is None:
            calibration = calibrated(model)
        return bind(model, method, protocol=protocol, calibration=calibration).new_cache()

    return make
