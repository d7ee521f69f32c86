"""What must hold for every registered method, whatever it does to keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench import quantized_cache
from kvbench.cache import EXACT, LayerQuantizer, LayerSpec, Uniform
from kvbench.methods.rtn import RTN

PROTOCOLS = ("quantized_prefill", "exact_prefill")
ARCHITECTURES = {
    "multi_head": dict(heads=4, kv_heads=4),
    "bias": dict(bias=True),
    "qwen2_bias": dict(kind="qwen2"),
    "head_dim_64": dict(head_dim=64),
    "head_dim_80": dict(head_dim=80),
    "head_dim_96": dict(head_dim=96),
    "head_dim_128": dict(head_dim=128),
    "head_dim_256": dict(head_dim=256),
}
BY_ATTENTION = {"mikv", "zipcache", "zipvl", "kvcrush"}
"""Methods that look at a prompt's attention as a whole: a longer prompt is another one."""
PROMPT = torch.arange(9, 69)[None] * 3 % 250 + 9


@dataclass(frozen=True)
class Exactly:
    """A method's transforms, windows and RoPE handling with every token exact."""

    inner: Any
    label: str = "exact"
    paper: str = "-"

    @property
    def needs(self) -> Any:
        return self.inner.needs

    def layer(self, spec: LayerSpec, calibration: Any) -> LayerQuantizer:
        return replace(self.inner.layer(spec, calibration), plan=Uniform(EXACT))


@torch.no_grad()
def logits(model: Any, cache: Any, new: int = 5) -> torch.Tensor:
    """Of the prompt and then `new` tokens one by one, (T + new, vocabulary)."""
    out = [model(PROMPT, past_key_values=cache).logits[0]]
    for token in range(new):
        out.append(model(torch.tensor([[20 + 7 * token]]), past_key_values=cache).logits[0])
    return torch.cat(out)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_every_token_exact_the_model_is_unchanged(
    tiny_text_model, double, small, caches, quantizer_name: str, architecture: str, protocol: str
) -> None:
    model = double(tiny_text_model(**ARCHITECTURES[architecture]).model)
    cache = caches(model, Exactly(small(quantizer_name)), protocol)
    expected = logits(model, DynamicCache(config=model.config))
    torch.testing.assert_close(logits(model, cache), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_lossy_storage_changes_the_logits_and_is_read(
    tiny_text_model, small, caches, lossy_name: str, protocol: str
) -> None:
    model = tiny_text_model().model
    cache = caches(model, small(lossy_name), protocol)
    mine, expected = logits(model, cache), logits(model, DynamicCache())
    assert cache.packed_tokens_read > 0
    assert (mine - expected).abs().max() > 1e-2
    assert mine.isfinite().all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_bit_destroys_the_answer(tiny_text_model, protocol: str) -> None:
    """A cache that is written but never read would pass every other comparison."""
    model = tiny_text_model().model
    options = dict(max_new_tokens=16, min_new_tokens=16, do_sample=False)
    exact = model.generate(PROMPT, past_key_values=DynamicCache(), **options)
    cache = quantized_cache(model, RTN(bits=1), protocol=protocol)  # type: ignore[arg-type]
    answer = model.generate(PROMPT, past_key_values=cache, **options)
    assert not torch.equal(answer, exact)
    layers, prompt, steps = 2, PROMPT.shape[1], 16
    reads = sum(prompt + step for step in range(steps))  # the prompt's last token, then 15 more
    assert cache.packed_tokens_read == layers * reads


def test_exact_prefill_leaves_all_prompt_logits_but_the_last(
    tiny_text_model, small, caches, lossy_name: str
) -> None:
    model = tiny_text_model().model
    cache = caches(model, small(lossy_name), "exact_prefill")
    mine, expected = logits(model, cache), logits(model, DynamicCache())
    last = PROMPT.shape[1] - 1
    torch.testing.assert_close(mine[:last], expected[:last], atol=1e-4, rtol=1e-4)
    assert (mine[last] - expected[last]).abs().max() > 1e-3


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_llava_next"])
def test_padded_rows_equal_the_same_rows_alone(
    request, double, small, caches, llava_inputs, quantizer_name: str, family: str, protocol: str
) -> None:
    tiny = request.getfixturevalue(family)
    inputs, model = llava_inputs(tiny), double(tiny.model)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    method = small(quantizer_name)
    both = model.generate(**inputs, past_key_values=caches(model, method, protocol), **options)
    keep = inputs["attention_mask"][1].bool()
    alone = {
        name: value[1:, keep] if value.dim() == 2 and value.shape[1] == keep.numel() else value[3:]
        for name, value in inputs.items()
    }
    one = model.generate(**alone, past_key_values=caches(model, method, protocol), **options)
    for mine, expected in zip(both.logits, one.logits, strict=True):
        torch.testing.assert_close(mine[1], expected[0], atol=1e-9, rtol=1e-9)


def feed(drive: Any, states: Any, prompt: int, vision: Any, residual: Any) -> Any:
    """A prompt in one call, then tokens one by one; yields after every call."""
    query, keys, values = states
    ends = [prompt, *range(prompt + 1, keys.shape[2] + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        cut = slice(start, end)
        drive.step(
            query[:, :, cut],
            keys[:, :, cut],
            values[:, :, cut],
            vision=vision[:, cut],
            residual=residual[:, cut] if start == 0 else None,
        )
        yield drive


@pytest.fixture
def drives(tiny_text_model, calibrated, small, driver):
    """Fresh layers of a method, with layer 1 of the tiny model's statistics and its RoPE."""
    model = tiny_text_model(head_dim=16).model

    def make(name: str, salient: bool, protocol: str = "quantized_prefill") -> Any:
        spec = LayerSpec(1, 2, 4, 2, 16, text_salient=salient)
        return driver(
            small(name),
            spec,
            protocol,
            calibration=calibrated(model),
            rotary=model.model.rotary_emb,
        )

    return make


@pytest.fixture
def facts() -> tuple[torch.Tensor, torch.Tensor]:
    """Vision in the middle of 70 tokens; massive activations in the first few."""
    vision = torch.zeros(1, 70, dtype=torch.bool)
    vision[:, 5:30] = True
    residual = torch.randn(1, 70, 32, generator=torch.Generator().manual_seed(1))
    residual[:, [0, 3, 11], 7] = torch.tensor([900.0, -700.0, 500.0])
    return vision, residual


@pytest.mark.parametrize("salient", [True, False])
@pytest.mark.parametrize("prompt", [16, 20, 37, 48])
def test_decoding_stores_the_codes_that_a_longer_prompt_stores(
    drives, facts, random_states, quantizer_name: str, prompt: int, salient: bool
) -> None:
    if quantizer_name in BY_ATTENTION:
        pytest.skip("tiers follow from the attention of the whole prompt")
    states, (vision, residual) = random_states(70), facts
    vision = vision & (torch.arange(70) < 16)  # generated tokens are text
    stepwise, whole = drives(quantizer_name, salient), drives(quantizer_name, salient)
    for _ in feed(stepwise, states, prompt, vision, residual):
        pass
    for _ in feed(whole, states, 70, vision, residual):
        pass
    mine, expected = stepwise.packed(), whole.packed()
    assert mine.keys() == expected.keys()
    for name in expected:
        for one, other in zip(mine[name], expected[name], strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("salient", [True, False])
def test_codes_never_change_once_written(
    drives, facts, random_states, lossy_name: str, salient: bool, protocol: str
) -> None:
    states, (vision, residual) = random_states(70), facts
    before: dict[str, list[torch.Tensor]] = {}
    for drive in feed(drives(lossy_name, salient, protocol), states, 40, vision, residual):
        now = drive.packed()
        for name, parts in before.items():
            for old, new in zip(parts, now[name], strict=True):
                assert torch.equal(old, new[:, :, : old.shape[2]]), name
        before = {name: [part.clone() for part in parts] for name, parts in now.items()}
    assert any(parts[0].shape[2] > 0 for parts in before.values())
