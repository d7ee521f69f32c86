"""The engine says what the reference cache says, token by token and byte by byte."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch

from kvbench.cache.layer import QuantizedLayer
from kvbench.cache.quantized import bind
from kvbench.cache.storage import SideStore
from kvbench.efficiency.engine import EagerEngine, Engine, StaticEngine, make_engine
from kvbench.efficiency.prompts import micro_batches, tokens_per_image
from kvbench.efficiency.workload import Workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = [
    "fp16",
    "rtn_int4",
    "rtn_int2",
    "rtn_int2_wht",
    "kivi[group_size=16,residual=16]",
    "akvq_vl[recent=12,pivots=3]",
    "akvq_vl[recent=0,pivots=3]",
    "akvq_vl[recent=64,pivots=3]",
    "akvq_vl[recent=12,pivots=3,rotation=random]",
    "rtn_int2_wht_tsa[recent=20]",
]


def model_of(tiny: Any) -> Any:
    return copy.deepcopy(tiny.model).float().to(DEVICE)


def bound_to(model: Any, method: str) -> Any:
    return bind(model, method, protocol="exact_prefill", text_salient_layers=(0,))


def generated(engine: Engine, model: Any, workload: Workload, rows: int) -> torch.Tensor:
    done = 0
    for prompts in micro_batches(model, workload, rows, seed=3):
        engine.prefill(done, prompts)
        done += len(prompts["input_ids"])
    for _ in range(workload.output_tokens - 1):
        engine.decode()
    return engine.outputs.cpu()


def reference(model: Any, method: str, workload: Workload, rows: int) -> Any:
    bound = bound_to(model, method)
    model.generation_config.eos_token_id = None  # the engine never stops early
    answers, caches = [], []
    for prompts in micro_batches(model, workload, rows, seed=3):
        cache = bound.new_cache()
        out = model.generate(
            **prompts,
            attention_mask=torch.ones_like(prompts["input_ids"]),
            past_key_values=cache,
            max_new_tokens=workload.output_tokens,
            do_sample=False,
        )
        answers.append(out[:, -workload.output_tokens :])
        caches.append(cache)
    return torch.cat(answers).cpu(), caches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "llava"])
def test_says_what_the_reference_cache_says(
    family: str, method: str, tiny_text_model: Any, tiny_llava: Any
) -> None:
    tiny = tiny_llava if family == "llava" else tiny_text_model(family)
    vision = 2 * tokens_per_image(tiny.model.config) if family == "llava" else 0
    workload = Workload(45, vision, 24, batch=3)
    wanted, caches = reference(model_of(tiny), method, workload, rows=2)
    model = model_of(tiny)
    engine = make_engine(model, bound_to(model, method), workload)
    assert isinstance(engine, StaticEngine)
    assert torch.equal(generated(engine, model, workload, rows=2), wanted)
    if method != "fp16":
        assert engine.packed_tokens_read > 0
    decoded = sum(cache.packed_tokens_read for cache in caches)
    assert engine.packed_tokens_read <= decoded  # the reference counts the prompt's last query too


@pytest.mark.parametrize("method", METHODS)
def test_layout_is_what_is_allocated(method: str, tiny_text_model: Any) -> None:
    model = model_of(tiny_text_model("llama"))
    workload = Workload(45, 0, 24, batch=2)
    engine = make_engine(model, bound_to(model, method), workload)
    assert isinstance(engine, StaticEngine)
    sides = [side for layer in engine.cache.layers for side in (layer.key, layer.value)]
    tensors = [
        t for side in sides for p in side.packed.values() for t in (p.codes, p.scale, p.zero)
    ]
    allocated = sum(t.nbytes for t in tensors if t is not None)
    allocated += sum(side.exact.nbytes for side in sides)
    assert engine.cache_nbytes == allocated
    assert 2 * engine.cache.layout.row_nbytes == allocated


def test_a_method_without_static_cache_runs_eagerly_and_says_why(tiny_text_model: Any) -> None:
    model = model_of(tiny_text_model("llama"))
    workload = Workload(45, 0, 8, batch=3)
    method = "akvq_vl[recent=12,flush_every=4]"
    wanted, _ = reference(model, method, workload, rows=3)
    engine = make_engine(model, bound_to(model, method), workload)
    assert isinstance(engine, EagerEngine)
    assert engine.path == "eager: its window releases tokens in groups"
    assert torch.equal(generated(engine, model, workload, rows=3), wanted)


def test_a_short_attention_window_runs_eagerly(tiny_text_model: Any) -> None:
    model = model_of(tiny_text_model("mistral", sliding_window=9))
    engine = make_engine(model, bound_to(model, "rtn_int4"), Workload(45, 0, 8))
    assert "window is shorter" in engine.path


@pytest.mark.parametrize("method", ["fp16", "akvq_vl[recent=12,pivots=3]"])
def test_prompts_are_held_twice_for_one_layer_at_most(
    method: str, tiny_text_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny_text_model("llama", layers=4))
    workload = Workload(45, 0, 8, batch=2)
    engine = make_engine(model, bound_to(model, method), workload)
    assert isinstance(engine, StaticEngine)
    stores: weakref.WeakSet[SideStore] = weakref.WeakSet()
    alive: list[int] = []
    begin = QuantizedLayer.lazy_initialization

    def counted(layer: QuantizedLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        alive.append(len(stores))
        begin(layer, keys, values)
        stores.update((layer.key_store, layer.value_store))

    monkeypatch.setattr(QuantizedLayer, "lazy_initialization", counted)
    engine.prefill(0, next(micro_batches(model, workload, 2, seed=0)))
    assert alive == [0, 0, 0, 0]
    assert len(stores) == 0
