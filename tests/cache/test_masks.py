"""Which tokens a query sees: the model's own mask rules in the first prompt."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from kvbench import quantized_cache
from kvbench.cache.attention import attend

PROTOCOLS = ("quantized_prefill", "exact_prefill")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_mask_that_is_more_than_causal_is_kept(case, exactly, protocol: str) -> None:
    """A prefix whose tokens all see one another, as prefix language models and Gemma 3 have."""
    model = case("llama").model
    ids = torch.arange(20, 50)[None]
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[:12, :12] = True
    results = []
    for cache in (
        quantized_cache(model, exactly("akvq_vl[recent=8]"), protocol=protocol),
        DynamicCache(),
    ):
        with torch.no_grad():
            prompt = model(ids, attention_mask=mask[None, None], past_key_values=cache).logits
            answer = model(torch.tensor([[60]]), past_key_values=cache).logits
        results.append(torch.cat((prompt, answer), 1))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        causal = model(ids).logits
    assert (causal - results[0][:, :30]).abs().max() > 1e-2


def test_a_query_that_sees_nothing_sees_everything() -> None:
    """Padding: its output is never used, but some kernels would make it NaN, which spreads."""
    query, keys = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    visible = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    visible[:, :, 2, :2] = True
    out = attend(query, keys, keys, visible, 1.0)
    torch.testing.assert_close(out[:, :, :2], attend(query[:, :, :2], keys, keys, None, 1.0))
    torch.testing.assert_close(
        out[:, :, 2:], attend(query[:, :, 2:], keys[:, :, :2], keys[:, :, :2], None, 1.0)
    )


@pytest.mark.parametrize("new", [1, 4])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_grouped_query_attention_written_out(new: int, softcap: float | None) -> None:
    source = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(2, heads, tokens, 8, dtype=torch.float64, generator=source)
        for heads, tokens in ((6, new), (2, 5), (2, 5))
    )
    visible = torch.rand(2, 1, new, 5, generator=source) < 0.7
    visible[..., 0] = True
    mine = attend(query, keys, values, visible, 0.3, softcap)
    for row in range(2):
        for head in range(6):
            for place in range(new):
                scores = keys[row, head // 3] @ query[row, head, place] * 0.3
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.exp(scores) * visible[row, 0, place]
                expected = (weights / weights.sum()) @ values[row, head // 3]
                tolerance = 1e-12 if softcap is None else 1e-6  # softmax in float32
                torch.testing.assert_close(
                    mine[row, head, place], expected, atol=tolerance, rtol=tolerance
                )
