"""Scores against a LLaMA written out in numpy float64, with round-to-nearest of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvbench.cache import quantized_cache
from kvbench.perplexity.rows import Scores
from kvbench.perplexity.score import compare, forced_logits

Array = np.ndarray
T, CONTEXT = 40, 30


def rtn(x: Array, bits: int) -> Array:
    """(H, n, D), each vector a group: AKVQ-VL's equations 3 to 6 with a float16 scale."""
    x = x.astype(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16).astype(np.float64)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1)
    return np.asarray((codes - zero) * scale)


def rms(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps))


def rope(x: Array, theta: float) -> Array:
    """(H, n, D)"""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(x / x.sum(-1, keepdims=True))


class Llama:
    """A decoder whose queries from `stored_from` on see keys and values as they are stored."""

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.w = {k: v.double().numpy() for k, v in model.state_dict().items()}

    def logits(self, ids: Array, store: Callable[[Array], Array], stored_from: int) -> Array:
        x = self.w["model.embed_tokens.weight"][ids]
        eps = self.config.rms_norm_eps
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}"
            h = rms(x, self.w[f"{name}.input_layernorm.weight"], eps)
            x = x + self.attention(f"{name}.self_attn", h, store, stored_from)
            h = rms(x, self.w[f"{name}.post_attention_layernorm.weight"], eps)
            gate, up = (h @ self.w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"{name}.mlp.down_proj.weight"].T
        return np.asarray(rms(x, self.w["model.norm.weight"], eps) @ self.w["lm_head.weight"].T)

    def attention(
        self, name: str, h: Array, store: Callable[[Array], Array], stored_from: int
    ) -> Array:
        theta, width = self.config.rope_parameters["rope_theta"], self.config.head_dim
        q, k, v = (
            (h @ self.w[f"{name}.{part}_proj.weight"].T).reshape(len(h), -1, width).swapaxes(0, 1)
            for part in "qkv"
        )
        q, k = rope(q, theta), rope(k, theta)
        groups = len(q) // len(k)
        causal = np.tril(np.ones((len(h), len(h)), dtype=bool))
        outs = []
        for keys, values in ((k, v), (store(k), store(v))):
            scores = q @ keys.repeat(groups, 0).swapaxes(1, 2) / np.sqrt(width)
            outs.append(softmax(np.where(causal, scores, -np.inf)) @ values.repeat(groups, 0))
        exact, stored = outs
        late = np.arange(len(h))[None, :, None] >= stored_from
        out = np.where(late, stored, exact).swapaxes(0, 1).reshape(len(h), -1)
        return np.asarray(out @ self.w[f"{name}.o_proj.weight"].T)


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@pytest.fixture(scope="module")
def model(tiny_text_model: Callable[..., Any]) -> Any:
    return copy.deepcopy(tiny_text_model().model).double()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(5, 260, (2, T + 1), generator=torch.Generator().manual_seed(0))


def scored(model: Any, ids: torch.Tensor, method: Any, protocol: Any) -> list[Scores | None]:
    """A method against the 16-bit cache on windows (B, T + 1), both protocols."""
    context = T if protocol == "quantized_prefill" else CONTEXT
    reference, mine = (
        list(
            forced_logits(
                model, ids[:, :-1], quantized_cache(model, name, protocol=protocol), context
            )
        )
        for name in ("fp16", method)
    )
    return compare(mine, reference, ids[:, 1 if context == T else context :])


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_as_written_out_in_numpy(model: Any, ids: torch.Tensor, protocol: str, bits: int) -> None:
    first, stored_from = (0, 0) if protocol == "quantized_prefill" else (CONTEXT - 1, CONTEXT - 1)
    by_hand = Llama(model)
    for window, found in zip(ids, scored(model, ids, f"rtn_int{bits}", protocol), strict=True):
        read, true = window[:-1].numpy(), window[1:].numpy()[first:]
        exact = by_hand.logits(read, lambda x: x, T)
        coarse = by_hand.logits(read, lambda x: rtn(x, bits), stored_from)
        p, q = log_softmax(exact)[first:], log_softmax(coarse)[first:]
        places = np.arange(len(true))
        kl = (np.exp(p) * (p - q)).sum(-1)
        delta = np.exp(q[places, true]) - np.exp(p[places, true])
        assert found is not None and len(found.nll) == len(true)
        assert kl.mean() > 1e-3  # else there is nothing to see
        # A number half-way between two codes may fall either way, which later positions then see.
        np.testing.assert_allclose(np.median(np.abs(found.nll + q[places, true])), 0, atol=5e-3)
        np.testing.assert_allclose(np.median(np.abs(found.kl - kl)), 0, atol=5e-3)
        np.testing.assert_allclose(np.mean(found.nll), -q[places, true].mean(), rtol=5e-3)
        np.testing.assert_allclose(np.mean(found.kl), kl.mean(), rtol=0.05)
        np.testing.assert_allclose(found.delta_p_squared, (delta**2).mean(), rtol=0.1)
        assert abs(found.agreeing - (p.argmax(-1) == q.argmax(-1)).sum()) <= 1


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_an_exact_cache_differs_by_nothing(model: Any, ids: torch.Tensor, protocol: str) -> None:
    for found in scored(model, ids, "fp16", protocol):
        assert found is not None
        assert max(found.kl) == found.delta_p_squared == 0
        assert found.agreeing == len(found.nll)


@pytest.mark.usefixtures("one_bit")
@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_one_bit_shows(model: Any, ids: torch.Tensor, protocol: str) -> None:
    exact, coarse = (scored(model, ids, name, protocol)[0] for name in ("fp16", "one_bit"))
    assert exact is not None and coarse is not None
    assert abs(np.mean(coarse.nll) - np.mean(exact.nll)) > 0.1
    assert np.mean(coarse.kl) > 0.1 and min(coarse.kl) > 0


def test_token_by_token_equals_one_pass_where_nothing_is_quantized(
    model: Any, ids: torch.Tensor
) -> None:
    at_once, stepwise = (
        torch.cat(list(forced_logits(model, ids[:, :-1], quantized_cache(model, "fp16"), n)), 1)
        for n in (T, CONTEXT)
    )
    torch.testing.assert_close(stepwise, at_once[:, CONTEXT - 1 :])


def test_what_is_not_finite_has_no_score(ids: torch.Tensor) -> None:
    reference = torch.zeros(2, T, 300)
    broken = reference.clone()
    broken[1, 3] = torch.nan
    first, second = compare([broken], [reference], ids[:, 1:])
    assert first is not None and second is None
