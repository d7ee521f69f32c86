from __future__ import annotations

import pytest
import torch

from kvbench import quantized_cache
from kvbench.registry import METHODS


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_cache_that_generate_takes(tiny_text_model, kind: str, protocol: str) -> None:
    tiny = tiny_text_model(kind)
    prompt = tiny.tokenizer("What is shown?", return_tensors="pt")["input_ids"]
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False)
    cache = quantized_cache(tiny.model, "hf_dynamic", protocol=protocol)
    method = METHODS.get("hf_dynamic")
    assert method.nbytes(cache) == 0
    answer = tiny.model.generate(prompt, past_key_values=cache, **settings)
    assert torch.equal(answer, tiny.model.generate(prompt, **settings))
    tokens = answer.shape[1] - 1
    assert method.nbytes(cache) == tokens * 2 * 2 * 2 * 16 * 4  # layers, sides, heads, channels
