from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvbench import quantized_cache
from kvbench.errors import UserError
from kvbench.registry import METHODS, configured

NEEDS_PACKAGE = "the extra [peers] is not installed"


@pytest.fixture
def quanto() -> None:
    pytest.importorskip("optimum.quanto", reason=NEEDS_PACKAGE)


def method(name: str = "hf_quanto_int4", **parameters: str) -> Any:
    return configured(METHODS.get(name), {"group_size": "16"} | parameters)


def rounded(x: torch.Tensor, bits: int, group: int) -> np.ndarray:
    """Groups of neighbours, nearest of 2^bits levels between minimum and maximum, in float64."""
    groups = x.double().numpy().reshape(-1, group)
    low = groups.min(1, keepdims=True)
    step = (groups.max(1, keepdims=True) - low) / (2**bits - 1)
    return (np.round((groups - low) / step) * step + low).reshape(x.shape)


@pytest.mark.parametrize("name", ["hf_quanto_int4", "hf_quanto_int2"])
def test_prompts_attend_to_exact_states(tiny_text_model, name: str) -> None:
    with pytest.raises(UserError, match="can't follow quantized_prefill; use exact_prefill"):
        quantized_cache(tiny_text_model().model, name, protocol="quantized_prefill")


def test_missing_package(tiny_text_model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    with pytest.raises(UserError, match=r'pip install "kvbench\[peers\]"'):
        method().cache(tiny_text_model().model, "exact_prefill")


@pytest.mark.usefixtures("quanto")
def test_missing_compiler(tiny_text_model, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbench.methods import hf_quanto

    def fail(*arguments: object) -> None:
        raise RuntimeError("Ninja is required\nto load C++ extensions")

    monkeypatch.setattr(torch.ops.quanto, "unpack", fail)
    hf_quanto._compile_extension.cache_clear()
    with pytest.raises(UserError, match=r"compiled for cpu \(Ninja is required\); install"):
        method().cache(tiny_text_model().model, "exact_prefill")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"bits": "3"}, "one of 2, 4"),
        ({"axis_key": "1"}, "one of 0, -1"),
        ({"group_size": "0"}, "group_size must be positive"),
        ({"residual": "-5"}, "residual must be positive"),
    ],
)
def test_bad_parameters(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method(**parameters)


@pytest.mark.parametrize(
    ("parameters", "numbers"), [({"group_size": "64"}, 32), ({"axis_value": "-1"}, 2)]
)
def test_groups_that_no_prompt_fills(tiny_text_model, parameters, numbers: int) -> None:
    with pytest.raises(UserError, match=f"must divide the {numbers} numbers of a token"):
        method(**parameters).cache(tiny_text_model().model, "exact_prefill")


def test_sliding_windows_are_refused(tiny_text_model) -> None:
    pytest.importorskip("optimum.quanto", reason=NEEDS_PACKAGE)
    model = tiny_text_model("mistral", sliding_window=9).model
    with pytest.raises(UserError, match="only full attention layers"):
        method().cache(model, "exact_prefill")


@pytest.mark.slow  # quanto compiles its extension at the first use
@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize(("name", "bits"), [("hf_quanto_int4", 4), ("hf_quanto_int2", 2)])
def test_what_is_stored(tiny_text_model, name: str, bits: int) -> None:
    torch.manual_seed(0)
    cache = method(name).cache(tiny_text_model().model, "exact_prefill")
    keys, values, key, value = (torch.randn(2, 2, n, 16) for n in (9, 9, 1, 1))
    seen = cache.update(keys, values, 0)
    assert torch.equal(seen[0], keys) and torch.equal(seen[1], values)
    for states, prompt, new in zip(
        cache.update(key, value, 0), (keys, values), (key, value), strict=True
    ):
        assert np.abs(states[..., :9, :].numpy() - rounded(prompt, bits, 16)).max() < 1e-5
        assert torch.equal(states[..., 9:, :], new)


@pytest.mark.slow
@pytest.mark.usefixtures("quanto")
def test_groups_along_tokens_and_heads(tiny_text_model) -> None:
    torch.manual_seed(0)
    chosen = method("hf_quanto_int2", group_size="2", axis_key="-1")
    cache = chosen.cache(tiny_text_model().model, "exact_prefill")
    keys = torch.randn(1, 2, 8, 16)
    cache.update(keys, keys, 0)
    stored, _ = cache.update(keys[:, :, :1], keys[:, :, :1], 0)
    by_channel = keys.movedim(-1, 0)
    expected = np.moveaxis(rounded(by_channel, 2, 2), 0, -1)
    assert np.abs(stored[..., :8, :].numpy() - expected).max() < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("quanto")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "residual"), [(4, 128), (2, 128), (2, 2)])
def test_bytes(tiny_text_model, bits: int, residual: int, dtype: torch.dtype) -> None:
    chosen = method(f"hf_quanto_int{bits}", residual=str(residual))
    cache = chosen.cache(tiny_text_model().model, "exact_prefill")
    for tokens in (12, 1, 1):
        for layer in range(2):
            states = torch.randn(3, 2, tokens, 16, dtype=dtype)
            cache.update(states, states, layer)
    width = dtype.itemsize
    exact = 0 if residual == 2 else 2  # the second answer token fills the residual
    a_token = 16 * bits // 8 + 2 * width  # codes, scale and minimum of a head
    a_head = (14 - exact) * a_token + exact * 16 * width
    assert chosen.nbytes(cache) == 2 * 2 * 3 * 2 * a_head  # layers, keys and values, rows, heads


@pytest.mark.slow
@pytest.mark.usefixtures("quanto")
def test_generate(tiny_text_model) -> None:
    tiny = tiny_text_model()
    cache = quantized_cache(tiny.model, "hf_quanto_int4[group_size=16]", protocol="exact_prefill")
    prompt = tiny.tokenizer("What is shown?", return_tensors="pt")["input_ids"]
    answer = tiny.model.generate(
        prompt, past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert cache.get_seq_length() == answer.shape[1] - 1 == prompt.shape[1] + 4
