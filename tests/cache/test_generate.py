"""transformers' generate with a quantized cache: every family, decoding strategy and protocol."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvbench import quantized_cache

PROTOCOLS = ("quantized_prefill", "exact_prefill")
FAMILIES = (
    "llama",
    "llama_mha_bias",
    "mistral_window",
    "qwen2_mixed_windows",
    "qwen2_vl_text",
    "qwen2_vl",
    "llava",
    "llava_next",
)
STRATEGIES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "beams": dict(num_beams=3),
    "several_answers": dict(do_sample=True, num_return_sequences=2),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_equals_the_dynamic_cache(
    case, greedy, distance, family: str, strategy: str, protocol: str
) -> None:
    given, options = case(family), STRATEGIES[strategy]
    cache = quantized_cache(given.model, "fp16", protocol=protocol)
    mine = greedy(given.model, given.inputs, cache, **options)
    reference = greedy(
        given.model, given.inputs, DynamicCache(config=given.model.config), **options
    )
    assert torch.equal(mine.sequences, reference.sequences)
    assert distance(mine, reference) < 1e-9
    assert cache.packed_tokens_read == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        "rtn_int2_wht",
        "akvq_vl[recent=8]",
        "kivi[residual=16,group_size=8]",
        "skvq[reorder=false,window=8]",
    ],
)
def test_transforms_and_rope_are_exact_when_nothing_is_quantized(
    case, exactly, greedy, distance, method: str, family: str, protocol: str
) -> None:
    given = case(family)
    cache = quantized_cache(given.model, exactly(method), protocol=protocol)
    mine = greedy(given.model, given.inputs, cache)
    reference = greedy(given.model, given.inputs, DynamicCache(config=given.model.config))
    assert torch.equal(mine.sequences, reference.sequences)
    assert distance(mine, reference) < 1e-9


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "method",
    [
        "akvq_vl[recent=8,pivots=2]",
        "kivi[residual=16,group_size=8]",
        "skvq[reorder=false,window=8]",
    ],
)
def test_padded_rows_equal_the_same_rows_alone(
    case, greedy, method: str, family: str, protocol: str
) -> None:
    given = case(family)

    def answer(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        cache = quantized_cache(given.model, method, protocol=protocol)
        logits = greedy(given.model, inputs, cache, 6).logits
        assert cache.packed_tokens_read > 0
        return list(logits)

    together = answer(given.inputs)
    for row in (0, 1):
        for mine, alone in zip(together, answer(given.row(row)), strict=True):
            torch.testing.assert_close(mine[row], alone[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        "rtn_int2",
        "skvq[reorder=false,window=8,metadata=fp8]",
        "mikv[ratio=0.3]",
        "zipcache[stream=3]",
        "zipvl[stream=3,drop=true,tau=0.8]",
    ],
)
def test_beams_carry_their_own_history(case, greedy, method: str) -> None:
    """Beam search on a padded batch answers as on each row alone."""
    given = case("llama")
    together = greedy(
        given.model, given.inputs, quantized_cache(given.model, method), 8, num_beams=3
    ).sequences
    for row in (0, 1):
        cache = quantized_cache(given.model, method)
        alone = greedy(given.model, given.row(row), cache, 8, num_beams=3).sequences
        assert torch.equal(together[row, -8:], alone[0, -8:])
