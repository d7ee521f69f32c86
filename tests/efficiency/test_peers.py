"""Plain `generate` as a runner: its clock, its probe, its bytes."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench.efficiency import peers
from kvbench.efficiency.peers import run_generate
from kvbench.efficiency.request import TrialRequest
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError
from kvbench.registry import METHODS, configured

WORKLOAD = Workload(24, 16, 7, 3)
PEER = METHODS.get("hf_dynamic")
TOKEN = 3 * 2 * 2 * 16 * 4  # layers, keys and values, heads, channels, float32


def request(probe: bool = False, workload: Workload = WORKLOAD) -> TrialRequest:
    return TrialRequest("tiny", "hf_dynamic", workload, "generate", device="cpu", probe=probe)


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[DynamicCache]:
    """The caches that the peer made."""
    made: list[DynamicCache] = []
    original = type(PEER).cache

    def cache(self: Any, model: Any, protocol: Any) -> Any:
        made.append(original(self, model, protocol))
        return made[-1]

    monkeypatch.setattr(type(PEER), "cache", cache)
    return made


def test_a_full_run(tiny_llava, caches: list[DynamicCache]) -> None:
    result = run_generate(request(), tiny_llava.model, PEER)
    assert (result.status, result.path) == ("ok", "generate")
    assert caches[0].get_seq_length() == WORKLOAD.cached_tokens == 30
    assert result.cache_bytes == 3 * 30 * TOKEN
    assert len(result.tpot_s) == 6
    assert result.ttft_s is not None and result.total_s is not None
    assert result.prompts_s == (result.ttft_s,) and 0 < result.ttft_s < result.total_s
    assert sum(result.tpot_s) == pytest.approx(result.decode_s, rel=0.3)
    parameters = sum(p.nbytes for p in tiny_llava.model.parameters())
    buffers = sum(b.nbytes for b in tiny_llava.model.buffers())
    assert result.weight_bytes is not None and result.vision_bytes is not None
    assert result.weight_bytes + result.vision_bytes == parameters + buffers


def test_what_a_mean_step_must_read(tiny_llava) -> None:
    result = run_generate(request(), tiny_llava.model, PEER)
    decoder = tiny_llava.model.model.language_model
    linear = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    linear += tiny_llava.model.lm_head.weight.numel()
    held = range(25, 31)  # tokens that the six steps attend to
    mean = 3 * TOKEN * sum(held) / len(held)
    assert result.bytes_per_step == pytest.approx(4 * linear + mean)
    assert result.flops_per_step == 2 * linear * 3


def test_steps_are_clocked_one_by_one(tiny_text_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text_model().model
    forward, calls = model.forward, [0]

    @functools.wraps(forward)
    def slow(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] in (3, 6):  # after a warm-up of two: the prompt, and the third step after it
            time.sleep(0.3)
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", slow)
    result = run_generate(request(workload=Workload(5, 0, 6, 2)), model, PEER)
    assert result.ttft_s is not None and result.ttft_s >= 0.3
    assert [step >= 0.3 for step in result.tpot_s] == [False, False, True, False, False]


@pytest.mark.parametrize("outputs", [1, 2, 4, 200])
def test_a_probe_fills_the_cache(tiny_llava, caches, monkeypatch, outputs: int) -> None:
    forward, calls = tiny_llava.model.forward, []

    @functools.wraps(forward)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(tiny_llava.model, "forward", counted)
    workload = Workload(24, 16, outputs, 2)
    result = run_generate(request(True, workload), tiny_llava.model, PEER)
    assert caches[0].get_seq_length() == workload.cached_tokens
    assert result.cache_bytes == 2 * workload.cached_tokens * TOKEN
    assert result.tpot_s == () and result.total_s is None
    assert calls == [24] + [1] * min(3, outputs - 1)


def test_probes_and_full_runs_take_the_same(tiny_text_model, caches) -> None:
    model = tiny_text_model().model
    workload = Workload(9, 0, 70, 2)
    for probe in (True, False):
        run_generate(request(probe, workload), model, PEER)
    shapes = [[layer.keys.shape for layer in cache.layers] for cache in caches]
    assert shapes[0] == shapes[1]


def test_random_tokens_never_end_an_answer(tiny_text_model, caches) -> None:
    model = tiny_text_model().model
    every = list(range(model.config.vocab_size - 1))
    settings = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = every
    try:
        run_generate(request(workload=Workload(5, 0, 9, 2)), model, PEER)
    finally:
        model.generation_config.eos_token_id = settings
    assert caches[0].get_seq_length() == 13


def test_our_own_methods_have_an_engine(tiny_text_model) -> None:
    with pytest.raises(UserError, match="hf_dynamic is no peer"):
        run_generate(request(), tiny_text_model().model, METHODS.get("fp16"))


def test_a_probe_adds_no_more_than_caches_take(tiny_text_model, caches, monkeypatch) -> None:
    sizes = []
    update = DynamicCache.update

    def seen(self: Any, keys: torch.Tensor, *rest: Any, **options: Any) -> Any:
        sizes.append(keys.shape[2])
        return update(self, keys, *rest, **options)

    monkeypatch.setattr(DynamicCache, "update", seen)
    run_generate(request(True, Workload(100, 0, 200, 1)), tiny_text_model().model, PEER)
    assert max(sizes[2:]) == peers._PIECE


@pytest.mark.slow  # quanto compiles its extension at the first use
@pytest.mark.parametrize("probe", [True, False])
def test_quanto(tiny_llava, probe: bool) -> None:
    pytest.importorskip("optimum.quanto", reason="the extra [peers] is not installed")
    method = configured(METHODS.get("hf_quanto_int2"), {"group_size": "16"})
    asked = request(probe, Workload(24, 16, 150, 2))
    result = run_generate(asked, tiny_llava.model, method)
    whole = run_generate(request(probe, Workload(24, 16, 150, 2)), tiny_llava.model, PEER)
    assert result.cache_bytes is not None and whole.cache_bytes is not None
    assert result.cache_bytes < 0.6 * whole.cache_bytes  # metadata is float32 here
