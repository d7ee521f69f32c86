"""Attention of one layer, step by step, against each method written out again in numpy float64.

The references keep no state: what is stored at a step follows from the states, the length so far
and the length of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvbench.cache import Calibration, LayerSpec
from kvbench.registry import METHODS, configured, parse_spec

HEADS, KV_HEADS, WIDTH = 4, 2, 16
PROTOCOLS = ("quantized_prefill", "exact_prefill")
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


def by_channel(x: Array, size: int, bits: int, *, integer: bool = False) -> Array:
    """(H, n, D) in groups of `size` tokens of a channel; n is a multiple of `size`."""
    out = np.empty_like(x)
    for head, channel in np.ndindex(x.shape[0], x.shape[2]):
        for start in range(0, x.shape[1], size):
            cut = slice(start, start + size)
            out[head, cut, channel] = grid(x[head, cut, channel], bits, integer=integer)
    return out


def rtn(step: Step) -> tuple[Array, Array]:
    return tuple(by_token(x, 8, 2, integer=True) for x in (step.keys, step.values))  # type: ignore[return-value]


def rtn_over_heads(step: Step) -> tuple[Array, Array]:
    """Groups of 32: both heads of a token together."""
    sides = []
    for x in (step.keys, step.values):
        flat = np.concatenate(list(x), -1)[None]
        back = by_token(flat, 32, 4, integer=False)[0]
        sides.append(np.stack(np.split(back, KV_HEADS, -1)))
    return sides[0], sides[1]


def smoothquant(step: Step) -> tuple[Array, Array]:
    sides = []
    for x, own, partner in (
        (step.keys, "key_absmax", "query_absmax"),
        (step.values, "value_absmax", "output_weight_absmax"),
    ):
        scale = (STATISTICS[own] ** 0.5 / STATISTICS[partner] ** 0.5)[0][:, None]
        sides.append(by_token(x / scale, 16, 2, integer=True) * scale)
    return sides[0], sides[1]


def kivi(step: Step) -> tuple[Array, Array]:
    """Residual 16, groups of 8: what was flushed after the step before, or after the prompt."""
    before = step.length - 1 if step.decoding else step.length
    packed_keys, packed_values = before - before % 16, max(before - 16, 0)
    return _kivi(step, packed_keys, packed_values)


def kivi_without_prompt_residual(step: Step) -> tuple[Array, Array]:
    rest = step.prompt % 8
    new = step.length - step.prompt - 1 if step.decoding else 0
    packed_keys = step.prompt - rest + (rest + new) // 16 * 16
    return _kivi(step, packed_keys, step.prompt + max(new - 16, 0))


def _kivi(step: Step, packed_keys: int, packed_values: int) -> tuple[Array, Array]:
    keys, values = step.keys.copy(), step.values.copy()
    keys[:, :packed_keys] = by_channel(keys[:, :packed_keys], 8, 2)
    values[:, :packed_values] = by_token(values[:, :packed_values], 8, 2, integer=False)
    return keys, values


def kvtuner(step: Step) -> tuple[Array, Array]:
    """One group a token and head: 8 bits for keys, 2 for values."""
    sides = ((step.keys, 8), (step.values, 2))
    return tuple(by_token(x, WIDTH, bits, integer=True) for x, bits in sides)  # type: ignore[return-value]


def kvtuner_kivi(step: Step) -> tuple[Array, Array]:
    """4-bit keys by channel, 2-bit values by token; `length mod 16` tokens exact on both sides."""
    before = step.length - 1 if step.decoding else step.length
    packed = before - before % 16
    keys, values = step.keys.copy(), step.values.copy()
    keys[:, :packed] = by_channel(keys[:, :packed], 8, 4, integer=True)
    values[:, :packed] = by_token(values[:, :packed], 8, 2, integer=True)
    return keys, values


def skvq(step: Step) -> tuple[Array, Array]:
    """Two sinks, a window of 8 with the current token, uneven groups, keys before RoPE."""
    positions = np.arange(step.length)
    packed = (positions >= min(2, step.prompt)) & (positions < step.length - 8)
    sides = []
    for name, x in (("key", turn(step.keys, -positions)), ("value", step.values.copy())):
        flat = np.concatenate(list(x), -1)
        for token in np.flatnonzero(packed):
            for members in CLUSTERS[name]:
                flat[token, members] = grid(flat[token, members], 2, clip=0.92, integer=False)
        sides.append(np.stack(np.split(flat, KV_HEADS, -1)))
    return turn(sides[0], positions), sides[1]


def turn(x: Array, positions: Array) -> Array:
    """RoPE of (H, T, D), base 10,000; pairs are (c, c + D / 2)."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    # The model's tables are float32.
    cos = np.cos(angles.astype(np.float32)).astype(np.float32).astype(np.float64)
    sin = np.sin(angles.astype(np.float32)).astype(np.float32).astype(np.float64)
    first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    norm = cos**2 + sin**2
    if positions[-1] > 0:
        norm = np.ones_like(norm)
    return np.concatenate(
        ((first * cos - second * sin) / norm, (second * cos + first * sin) / norm), -1
    )


def akvq_text_salient(step: Step) -> tuple[Array, Array]:
    bits = np.where(step.vision[: step.length], 2, 4)
    return _akvq(step, bits, np.zeros(step.length, dtype=bool))


def akvq_pivot_salient(step: Step) -> tuple[Array, Array]:
    scores = np.abs(step.residual[: step.prompt]).max(1)
    pivots = np.zeros(step.length, dtype=bool)
    pivots[np.argsort(-scores, kind="stable")[:3]] = True
    return _akvq(step, np.full(step.length, 2), pivots)


def _akvq(step: Step, bits: Array, exact: Array) -> tuple[Array, Array]:
    """8 recent tokens, clip 0.8 at 2 bits and 1.0 at 4, groups of 8 behind a Hadamard rotation."""
    rotation = hadamard(WIDTH) / np.sqrt(WIDTH)
    recent = np.arange(step.length) >= step.length - 8
    sides = []
    for x in (step.keys, step.values):
        stored = x @ rotation
        for token in np.flatnonzero(~(recent | exact)):
            clip = {2: 0.8, 4: 1.0}[int(bits[token])]
            one = stored[:, token : token + 1]
            stored[:, token : token + 1] = by_token(
                one, 8, int(bits[token]), clip=clip, integer=True
            )
        sides.append(stored @ rotation.T)
    return sides[0], sides[1]


_SOURCE = np.random.default_rng(5)
STATISTICS = {
    name: _SOURCE.uniform(0.3, 4, (1, KV_HEADS, WIDTH)).astype(np.float32).astype(np.float64)
    for name in ("key_absmax", "query_absmax", "value_absmax", "output_weight_absmax")
}
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

REFERENCES: dict[str, tuple[str, bool, Callable[[Step], tuple[Array, Array]]]] = {
    "rtn": ("rtn_int2[group_size=8]", False, rtn),
    "rtn_over_heads": ("rtn_int4[zero=float,group_over_heads=true]", False, rtn_over_heads),
    "smoothquant": ("smoothquant", False, smoothquant),
    "kivi": ("kivi[group_size=8,residual=16]", False, kivi),
    "kivi_prompt": (
        "kivi[group_size=8,residual=16,prompt_residual=false]",
        False,
        kivi_without_prompt_residual,
    ),
    "kvtuner": ("kvtuner[pairs=K8V2]", False, kvtuner),
    "kvtuner_kivi": (
        "kvtuner[pairs=K4V2,scheme=kivi,group_size=8,residual=16]",
        False,
        kvtuner_kivi,
    ),
    "skvq": ("skvq[group_size=11,window=8,sinks=2]", False, skvq),
    "akvq_text": ("akvq_vl[recent=8,pivots=3,group_size=8]", True, akvq_text_salient),
    "akvq_pivot": ("akvq_vl[recent=8,pivots=3,group_size=8]", False, akvq_pivot_salient),
}


def attend(query: Array, keys: Array, values: Array) -> Array:
    """(Hq, D) queries of one token on (H, T, D) keys and values."""
    out = np.empty_like(query)
    for head in range(HEADS):
        shared = head // (HEADS // KV_HEADS)
        scores = keys[shared] @ query[head] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[shared] / weights.sum()
    return out


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("prompt", [1, 7, 16, 41])
@pytest.mark.parametrize("name", REFERENCES)
def test_every_step_attends_to_what_the_method_says(
    driver: Any, random_states: Any, name: str, prompt: int, protocol: str
) -> None:
    spec, salient, reference = REFERENCES[name]
    total = prompt + 21
    query, keys, values = (x.double() for x in random_states(total, seed=prompt))
    vision, residual = np.zeros(total, dtype=bool), np.random.default_rng(1).normal(size=(total, 8))
    vision[3 : prompt // 2] = True
    residual[[0, prompt // 2, prompt - 1], 3] = 500.0, -300.0, 100.0
    residual[prompt:] *= 1000  # generated tokens are never pivots
    head, parameters = parse_spec(spec)
    drive = driver(
        configured(METHODS.get(head), parameters),
        LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH, text_salient=salient),
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
