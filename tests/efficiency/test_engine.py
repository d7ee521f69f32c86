"""The engine says what the reference cache says, token by token and byte by byte."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvbench.cache.plans import Uniform
from kvbench.cache.quantized import bind
from kvbench.efficiency.engine import EagerEngine, Engine, StaticEngine, make_engine
from kvbench.efficiency.prompts import micro_batches, tokens_per_image
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError

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
    for first_row, prompts in micro_batches(model, workload, rows, seed=3):
        engine.prefill(first_row, prompts)
    for _ in range(workload.output_tokens - 1):
        engine.decode()
    return engine.outputs.cpu()


def reference(model: Any, method: str, workload: Workload, rows: int) -> Any:
    bound = bound_to(model, method)
    model.generation_config.eos_token_id = None  # the engine never stops early
    answers, caches = [], []
    for _, prompts in micro_batches(model, workload, rows, seed=3):
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


@pytest.mark.parametrize(("tokens", "engine"), [(3, EagerEngine), (4, StaticEngine)])
def test_a_prompt_shorter_than_its_sinks_runs_eagerly(
    tokens: int, engine: type, tiny_text_model: Any
) -> None:
    model = model_of(tiny_text_model("llama"))
    bound = bound_to(model, "rtn_int2")
    sinks = tuple(replace(each, plan=Uniform(2, sinks=4)) for each in bound.quantizers)
    bound = replace(bound, quantizers=sinks)
    assert isinstance(make_engine(model, bound, Workload(tokens, 0, 4)), engine)


def test_prompts_that_attend_to_what_is_stored_run_eagerly(tiny_text_model: Any) -> None:
    model = model_of(tiny_text_model("llama"))
    engine = make_engine(model, bind(model, "rtn_int4"), Workload(45, 0, 8))
    assert engine.path == "eager: its prompts attend to what is stored"


def test_a_prompt_beyond_the_rehearsed_room_is_refused(tiny_text_model: Any) -> None:
    model = model_of(tiny_text_model("llama"))
    workload = Workload(45, 0, 8, batch=2)
    engine = make_engine(model, bound_to(model, "akvq_vl[recent=12,pivots=3]"), workload)
    assert isinstance(engine, StaticEngine)
    generated(engine, model, workload, rows=2)
    assert engine.packed_tokens_read > 0
    keys, bits = torch.zeros(2, 2, 45, 16), torch.full((2, 45), 16, dtype=torch.int8)
    keys = keys.to(DEVICE)
    engine.cache.fill(slice(0, 2), 1, keys, keys, bits.to(DEVICE))  # all tokens are pivots
    with pytest.raises(UserError, match="more tokens of a precision"):
        _ = engine.packed_tokens_read


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU says so later, and is of no use then")
def test_features_match_their_places(tiny_llava: Any) -> None:
    model = model_of(tiny_llava)
    vision = tokens_per_image(model.config)
    engine = make_engine(model, bound_to(model, "fp16"), Workload(vision + 9, vision, 4))
    _, prompts = next(micro_batches(model, Workload(vision + 9, vision, 4), 1, seed=0))
    prompts["input_ids"][0, 0] = model.config.image_token_id
    with pytest.raises(RuntimeError, match="match their places"):
        engine.prefill(0, prompts)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["fp16", "akvq_vl", "kivi", "rtn_int2_wht"])
def test_prompts_and_steps_never_wait_for_the_device(method: str, tiny_text_model: Any) -> None:
    never_waits(model_of(tiny_text_model("llama", head_dim=64)), method, Workload(300, 0, 8, 4))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_prompts_with_images_never_wait_for_the_device(tiny_llava: Any) -> None:
    model = model_of(tiny_llava)
    vision = 4 * tokens_per_image(model.config)
    never_waits(model, "akvq_vl", Workload(vision + 200, vision, 8, 4))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["fp16", "akvq_vl", "kivi", "rtn_int2_wht"])
def test_later_rows_compile_nothing(
    method: str, tiny_text_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.jit import JITFunction

    model = model_of(tiny_text_model("llama", head_dim=64)).half()
    workload = Workload(300, 0, 8, batch=7)
    engine = make_engine(model, bound_to(model, method), workload)
    prompts = micro_batches(model, workload, 1, seed=0)
    engine.prefill(*next(prompts))
    compiled: list[str] = []
    compile_, name = JITFunction._do_compile, "_do_compile"
    monkeypatch.setattr(
        JITFunction, name, lambda self, *args: compiled.append(str(self)) or compile_(self, *args)
    )
    for first_row, some in prompts:
        engine.prefill(first_row, some)
    engine.decode()
    assert not compiled


def never_waits(model: Any, method: str, workload: Workload) -> None:
    model = model.half()
    engine = make_engine(model, bound_to(model, method), workload)
    engine.prefill(*next(micro_batches(model, workload, 4, seed=0)))  # copies constants
    engine.forget()
    prompts = micro_batches(model, workload, 4, seed=0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.prefill(*next(prompts))
        engine.decode()
    finally:
        torch.cuda.set_sync_debug_mode("default")
