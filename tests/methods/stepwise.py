"""A method's layer driven step by step beside the method written out again in numpy float64.

The references keep no state: what is stored at a step follows from the states, the length so far
and the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import hadamard
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvbench.cache import Calibration, LayerSpec
from kvbench.registry import METHODS, configured, parse_spec

HEADS, KV_HEADS, WIDTH = 4, 2, 16
PROTOCOLS = ("quantized_prefill", "exact_prefill")
PROMPTS = (1, 7, 16, 41)
ROTATION = hadamard(WIDTH) / np.sqrt(WIDTH)
Array = np.ndarray


@dataclass(frozen=True)
class Step:
    """What is known when a query attends: (H, T, D) states of the `length` tokens so far."""

    keys: Array
    values: Array
    prompt: int
    decoding: bool
    vision: Array
    residual: Array

    @property
    def length(self) -> int:
        return int(self.keys.shape[1])


Reference = Callable[[Step], tuple[Array, Array]]
"""Keys and values of all tokens so far, as they are read from storage."""


def half(x: Array | float) -> Array:
    return np.asarray(x, dtype=np.float16).astype(np.float64)


def grid(x: Array, bits: int, *, clip: float = 1.0, integer: bool) -> Array:
    """One group, quantized and back: AKVQ-VL eq. 3-6 (`integer`) or KIVI's eq. 1."""
    x, levels = x.astype(np.float32), np.float32(2**bits - 1)
    # In float32, or a float16 scale may be rounded to another neighbour.
    low, high = np.float32(clip) * x.min(), np.float32(clip) * x.max()
    scale, x = half((high - low) / levels), x.astype(np.float64)
    if integer:
        zero = np.rint(-low / scale)
        return np.asarray(scale * (np.clip(np.rint(x / scale) + zero, 0, levels) - zero))
    low = half(low)
    return np.asarray(np.clip(np.rint((x - low) / scale), 0, levels) * scale + low)


def by_token(x: Array, size: int, bits: int, **how: Any) -> Array:
    """(H, n, D) in groups of `size` channels of a head."""
    out = np.empty_like(x)
    for head, token in np.ndindex(x.shape[:2]):
        for start in range(0, x.shape[2], size):
            cut = slice(start, start + size)
            out[head, token, cut] = grid(x[head, token, cut], bits, **how)
    return out


_SOURCE = np.random.default_rng(5)
STATISTICS = {
    name: _SOURCE.uniform(0.3, 4, (1, KV_HEADS, WIDTH)).astype(np.float32).astype(np.float64)
    for name in ("key_absmax", "query_absmax", "value_absmax", "output_weight_absmax")
}
STATISTICS["key_mean"] = _SOURCE.normal(size=(1, KV_HEADS, WIDTH))
for _name in ("query_second_moment", "value_second_moment"):
    _spread = _SOURCE.normal(size=(1, KV_HEADS, 40, WIDTH)) * _SOURCE.uniform(0.1, 5, WIDTH)
    STATISTICS[_name] = (_spread.swapaxes(-1, -2) @ _spread).astype(np.float32).astype(np.float64)
# Three kinds of channel, far apart in (min, max), so that any k-means finds them.
_KINDS = {
    "key": _SOURCE.permutation([0] * 20 + [1] * 9 + [2] * 3),
    "value": _SOURCE.permutation([0] * 15 + [1] * 15 + [2] * 2),
}
CLUSTERS = {
    name: [np.flatnonzero(kinds == kind) for kind in range(3)] for name, kinds in _KINDS.items()
}
for _name, _kinds in _KINDS.items():
    for _end, _sign in (("min", -1), ("max", 1)):
        _spread = _sign * 10.0**_kinds + _SOURCE.uniform(-0.1, 0.1, 32)
        STATISTICS[f"{_name}_{_end}"] = _spread.reshape(1, KV_HEADS, WIDTH)


def made(spec: str) -> Any:
    """A registered method with parameters."""
    name, parameters = parse_spec(spec)
    return configured(METHODS.get(name), parameters)


def attend(query: Array, keys: Array, values: Array, here: Array | None = None) -> Array:
    """(Hq, D) queries of one token on the (H, T, D) keys and values that are `here`, (H, T)."""
    out = np.empty_like(query)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        mine = slice(None) if here is None else here[shared]
        scores = keys[shared, mine] @ query[head] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[shared, mine] / weights.sum()
    return out


def check_steps(
    driver: Any,
    random_states: Any,
    reference: Reference,
    spec: str,
    prompt: int,
    protocol: str,
    *,
    text_salient: bool = False,
) -> None:
    """Hold a prompt and the 21 tokens after it against the reference, query by query."""
    total = prompt + 21
    query, keys, values = (x.double() for x in random_states(total, seed=prompt))
    vision, residual = np.zeros(total, dtype=bool), np.random.default_rng(1).normal(size=(total, 8))
    vision[3 : prompt // 2] = True
    residual[[0, prompt // 2, prompt - 1], 3] = 500.0, -300.0, 100.0
    residual[prompt:] *= 1000  # generated tokens are never pivots
    drive = driver(
        made(spec),
        LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH, text_salient=text_salient),
        protocol,
        calibration=Calibration({k: torch.from_numpy(v).float() for k, v in STATISTICS.items()}),
        rotary=LlamaRotaryEmbedding(
            LlamaConfig(hidden_size=64, num_attention_heads=HEADS, rope_theta=10000.0)
        ),
    )
    for start, end in zip([0, *range(prompt, total)], range(prompt, total + 1), strict=False):
        cut = slice(start, end)
        out = drive.step(
            query[:, :, cut],
            keys[:, :, cut],
            values[:, :, cut],
            vision=torch.from_numpy(vision[None, cut]),
            residual=torch.from_numpy(residual[None, cut]) if start == 0 else None,
        )
        past = (x[0, :, :end].numpy() for x in (keys, values))
        state = Step(*past, prompt, start > 0, vision, residual)
        stored = reference(state)
        for place in range(start, end):
            exact = protocol == "exact_prefill" and place < end - 1
            seen = (state.keys, state.values) if exact else stored
            expected = attend(query[0, :, place].numpy(), *(x[:, : place + 1] for x in seen))
            np.testing.assert_allclose(out[0, :, place - start], expected, atol=2e-6, rtol=1e-5)
