"""Attention of one layer, step by step, against each method written out again in numpy float64.

The references keep no state: what is stored at a step follows from the states, the length so far
and the length of the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid
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


def e4m3(x: Array) -> Array:
    """The nearest of 3-bit mantissas with exponents from -6, up to 448."""
    exponent = np.clip(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6, 8)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def fp8(step: Step) -> tuple[Array, Array]:
    sides = []
    for x in (step.keys, step.values):
        scale = (np.abs(x).max(-1, keepdims=True) / 448).astype(np.float32)
        sides.append(e4m3(x / scale) * scale)
    return sides[0], sides[1]


def fp8_static(step: Step) -> tuple[Array, Array]:
    return e4m3(step.keys / 0.01) * 0.01, e4m3(step.values / 0.01) * 0.01


def nvfp4(step: Step) -> tuple[Array, Array]:
    """A head is one block of 16."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    sides = []
    for name, x in (("key", step.keys), ("value", step.values)):
        whole = STATISTICS[f"{name}_absmax"].max() / 448
        block = e4m3(np.abs(x).max(-1, keepdims=True) / 6 / whole) * whole
        code = np.abs(np.abs(x / block)[..., None] - levels).argmin(-1)
        sides.append(np.sign(x) * levels[code] * block)
    return sides[0], sides[1]


ROTATION = hadamard(WIDTH) / np.sqrt(WIDTH)


def quarot(step: Step) -> tuple[Array, Array]:
    keys, values = (
        by_token(x @ ROTATION, 16, 4, clip=0.95, integer=True) @ ROTATION.T
        for x in (step.keys, step.values)
    )
    return keys, values


@functools.cache
def centroids(bits: int, order: int) -> Array:
    """Lloyd's iteration on a fine grid; the law of a unit vector's coordinate, or a normal one."""
    if order:
        x = np.linspace(-np.sqrt(order), np.sqrt(order), 400_001)
        density = np.maximum(1 - x * x / order, 0) ** ((order - 3) / 2)
    else:
        x = np.linspace(-9, 9, 400_001)
        density = np.exp(-x * x / 2)
    mass, moment = (cumulative_trapezoid(y, x, initial=0) for y in (density, density * x))
    found = np.quantile(x[np.abs(x) < 3], (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(1000):
        edges = np.concatenate((x[:1], (found[1:] + found[:-1]) / 2, x[-1:]))
        between = (np.diff(np.interp(edges, x, whole)) for whole in (moment, mass))
        found = np.divide(*between)
    return np.asarray(found)


def in_codebook(x: Array, bits: int, *, corrected: bool, order: int) -> Array:
    """Rotated, each direction rounded to the codebook, and turned back."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    table = centroids(bits, order)
    unit = x @ ROTATION / norm * np.sqrt(WIDTH)
    chosen = table[np.abs(unit[..., None] - table).argmin(-1)]
    size = np.linalg.norm(chosen, axis=-1, keepdims=True) if corrected else np.sqrt(WIDTH)
    return np.asarray(half(norm) * chosen / size @ ROTATION.T)


def turboquant(step: Step) -> tuple[Array, Array]:
    keys = in_codebook(step.keys, 3, corrected=True, order=0)
    return keys, by_token(step.values, 16, 4, integer=False)


def turboquant_k8v4(step: Step) -> tuple[Array, Array]:
    return e4m3(step.keys), by_token(step.values, 16, 4, integer=False)


def turboquant_paper(step: Step) -> tuple[Array, Array]:
    keys, values = (
        in_codebook(x, 2, corrected=False, order=WIDTH) for x in (step.keys, step.values)
    )
    return keys, values


def oscar(step: Step) -> tuple[Array, Array]:
    """2 sinks, 8 to 15 recent tokens; groups of 8 clamped to |x| of rank 5 (keys) and 7."""
    recent = min(step.length, 8) + max(step.length - 8, 0) % 8
    sides = []
    for x, statistic, rank in (
        (step.keys, "query_second_moment", 5),
        (step.values, "value_second_moment", 7),
    ):
        moment = STATISTICS[statistic][0].mean(0)
        values, vectors = np.linalg.eigh(moment)
        signs = [np.sign(column[np.abs(column).argmax()]) for column in vectors.T]
        turned = vectors * signs @ ROTATION
        turn = np.empty_like(turned)
        for place, channel in enumerate(np.argsort(-values)):
            turn[:, int(f"{place:04b}"[::-1], 2)] = turned[:, channel]
        stored = x @ turn
        for head, token in np.ndindex(stored.shape[:2]):
            if min(2, step.prompt) <= token < step.length - recent:
                for group in stored[head, token].reshape(2, 8):
                    limit = np.sort(np.abs(group))[rank]
                    group[:] = grid(np.clip(group, -limit, limit), 2, integer=False)
        sides.append(stored @ turn.T)
    return sides[0], sides[1]


def rotatekv(step: Step) -> tuple[Array, Array]:
    """Both heads turned together before RoPE and sorted; the 3 largest elements' tokens exact."""
    positions = np.arange(step.length)
    both = hadamard(2 * WIDTH) / np.sqrt(2 * WIDTH)
    order = np.argsort(np.concatenate(list(STATISTICS["key_mean"][0])) @ both)
    largest = np.argsort(-np.abs(step.residual[: step.prompt]).ravel())[:3]
    packed = ~np.isin(positions, largest // step.residual.shape[1])
    keys = np.concatenate(list(turn(step.keys, -positions)), -1) @ both
    values = step.values @ ROTATION
    for token in np.flatnonzero(packed):
        cut = slice(token, token + 1)
        sorted_keys = by_token(keys[None, cut, order], 8, 2, clip=0.8, integer=True)
        keys[token, order] = sorted_keys[0, 0]
        values[:, cut] = by_token(values[:, cut], 8, 2, clip=0.8, integer=True)
    heads = np.stack(np.split(keys @ both.T, KV_HEADS, -1))
    return turn(heads, positions), values @ ROTATION.T


def vidkv(step: Step, salient: bool = False) -> tuple[Array, Array]:
    """Groups of 8 tokens; packed are the prompt's whole groups, then 16 tokens at a time."""
    held = step.prompt // 8 * 8
    before = max(step.length - 1, step.prompt) if step.decoding else step.length
    packed = held + (before - held) // 16 * 16
    keys, values = step.keys.copy(), step.values.copy()
    spread = np.ptp(keys[:, : step.prompt], axis=(0, 1))
    order = np.argsort(-spread, kind="stable")
    groups = [np.arange(start, start + 8) for start in range(0, packed, 8)]
    chosen = np.array([], dtype=int)
    if salient:
        vision = np.flatnonzero(step.vision[:held])
        text = step.residual[: step.prompt][~step.vision[: step.prompt]]
        count = int(0.8 * len(vision)) // 8 * 8
        scores = step.residual[vision] @ text.mean(0) if count else vision
        chosen = np.sort(vision[np.argsort(-scores, kind="stable")[:count]])
        rest = np.setdiff1d(np.arange(packed), chosen)
        groups = [*rest.reshape(-1, 8), *chosen.reshape(-1, 8)]
    for group in groups:
        for head in range(KV_HEADS):
            block = keys[head][np.ix_(group, order)]
            for channel in range(8):
                block[:, channel] = grid(block[:, channel], 2, integer=False)
            rows = np.fft.rfft(block[:, 8:], norm="ortho")
            rows = signs(rows.real) + 1j * signs(rows.imag * [0, 1, 1, 1, 0])
            block[:, 8:] = np.fft.irfft(rows, n=8, norm="ortho")
            keys[head][np.ix_(group, order)] = block
            value = values[head][group]
            if len(chosen) and group[0] in chosen:
                value = np.stack([grid(column, 2, integer=False) for column in value.T], 1)
            else:
                size = half(np.abs(value).mean(0))
                value = np.sign(value) * (np.abs(value) > 0.7 * size) * size
            values[head][group] = value
    return keys, values


def signs(rows: Array) -> Array:
    """Each number ± the mean magnitude of its column."""
    return np.where(rows >= 0, 1, -1) * half(np.abs(rows).mean(0))


def vidkv_salient(step: Step) -> tuple[Array, Array]:
    return vidkv(step, salient=True)


def vidkv_as_shipped(step: Step) -> tuple[Array, Array]:
    """Signs and scales lost, as in the released code."""
    held = step.prompt // 8 * 8
    before = max(step.length - 1, step.prompt) if step.decoding else step.length
    keys, values = step.keys.copy(), step.values.copy()
    order = np.argsort(-np.ptp(keys[:, : step.prompt], axis=(0, 1)), kind="stable")
    for start in range(0, held + (before - held) // 16 * 16, 8):
        cut = slice(start, start + 8)
        for head in range(KV_HEADS):
            block = keys[head, cut][:, order]
            for channel in range(8):
                block[:, channel] = grid(block[:, channel], 2, integer=False)
            rows = np.fft.fft(block[:, 8:])
            parts = [(x >= 0) * np.abs(x / np.sqrt(8)).mean(0) for x in (rows.real, rows.imag)]
            real, imaginary = (half(x) for x in parts)
            block[:, 8:] = np.fft.ifft((real + 1j * imaginary) * np.sqrt(8)).real
            keys[head, cut, order] = block.T
            value = values[head, cut]
            value[:] = np.sign(value) * (np.abs(value) > 0.5 * half(np.abs(value).mean(0)))
    return keys, values


def calibquant(step: Step) -> tuple[Array, Array]:
    """Vision tokens of the prompt at the nearer of two levels a channel."""
    vision = np.flatnonzero(step.vision[: step.prompt])
    sides = []
    for x, shrink in ((step.keys, 0.5), (step.values, 0.3)):
        stored = x.copy()
        for head, channel in np.ndindex(KV_HEADS, WIDTH) if len(vision) else ():
            column = x[head, vision, channel]
            stored[head, vision, channel] = grid(column, 1, clip=shrink, integer=False)
        sides.append(stored)
    return sides[0], sides[1]


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
    "fp8": ("fp8", False, fp8),
    "fp8_static": ("fp8[static=0.01]", False, fp8_static),
    "nvfp4": ("nvfp4", False, nvfp4),
    "quarot_kv": ("quarot_kv", False, quarot),
    "turboquant": ("turboquant_k3v4_nc", False, turboquant),
    "turboquant_k8v4": ("turboquant_k8v4", False, turboquant_k8v4),
    "turboquant_paper": ("turboquant_paper[bits=2,rotation=hadamard]", False, turboquant_paper),
    "oscar": ("oscar[group_size=8,sinks=2,recent=8,key_keep=0.7]", False, oscar),
    "rotatekv": ("rotatekv[group_size=8,pivots=3]", False, rotatekv),
    "vidkv": ("vidkv[group_size=8,residual=16]", False, vidkv),
    "vidkv_salient": ("vidkv[group_size=8,residual=16,salient=0.8]", False, vidkv_salient),
    "vidkv_shipped": (
        "vidkv_as_shipped[group_size=8,residual=16]",
        False,
        vidkv_as_shipped,
    ),
    "calibquant": ("calibquant[calibrate=false]", False, calibquant),
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
