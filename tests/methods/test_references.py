"""Every method step by step; those with evenly spaced levels are written out again here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.linalg import hadamard

from tests.methods.codebook_references import REFERENCES as CODEBOOKS
from tests.methods.stepwise import (
    CLUSTERS,
    KV_HEADS,
    PROMPTS,
    PROTOCOLS,
    ROTATION,
    STATISTICS,
    WIDTH,
    Array,
    Reference,
    Step,
    by_token,
    check_steps,
    grid,
)
from tests.methods.vision_references import REFERENCES as VISION


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


def by_channel(x: Array, size: int, bits: int, *, integer: bool = False) -> Array:
    """(H, n, D) in groups of `size` tokens of a channel; n is a multiple of `size`."""
    out = np.empty_like(x)
    for head, channel in np.ndindex(x.shape[0], x.shape[2]):
        for start in range(0, x.shape[1], size):
            cut = slice(start, start + size)
            out[head, cut, channel] = grid(x[head, cut, channel], bits, integer=integer)
    return out


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
    packed = (positions >= 2) & (positions < step.length - 8)
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


def quarot(step: Step) -> tuple[Array, Array]:
    keys, values = (
        by_token(x @ ROTATION, 16, 4, clip=0.95, integer=True) @ ROTATION.T
        for x in (step.keys, step.values)
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
            if 2 <= token < step.length - recent:
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


REFERENCES: dict[str, tuple[str, Reference]] = {
    **CODEBOOKS,
    **VISION,
    "rtn": ("rtn_int2[group_size=8]", rtn),
    "rtn_over_heads": ("rtn_int4[zero=float,group_over_heads=true]", rtn_over_heads),
    "smoothquant": ("smoothquant", smoothquant),
    "kivi": ("kivi[group_size=8,residual=16]", kivi),
    "kivi_prompt": (
        "kivi[group_size=8,residual=16,prompt_residual=false]",
        kivi_without_prompt_residual,
    ),
    "kvtuner": ("kvtuner[pairs=K8V2]", kvtuner),
    "kvtuner_kivi": ("kvtuner[pairs=K4V2,scheme=kivi,group_size=8,residual=16]", kvtuner_kivi),
    "skvq": ("skvq[group_size=11,window=8,sinks=2]", skvq),
    "quarot_kv": ("quarot_kv", quarot),
    "oscar": ("oscar[group_size=8,sinks=2,recent=8,key_keep=0.7]", oscar),
    "rotatekv": ("rotatekv[group_size=8,pivots=3]", rotatekv),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", REFERENCES)
def test_every_step_attends_to_what_the_method_says(
    driver: Any, random_states: Any, name: str, prompt: int, protocol: str
) -> None:
    spec, reference = REFERENCES[name]
    salient = name == "akvq_text"
    check_steps(driver, random_states, reference, spec, prompt, protocol, text_salient=salient)
