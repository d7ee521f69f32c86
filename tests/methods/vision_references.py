"""Methods that tell images from text, each written out again."""

from __future__ import annotations

import numpy as np
from scipy.linalg import hadamard

from tests.methods.stepwise import (
    KV_HEADS,
    WIDTH,
    Array,
    Reference,
    Step,
    by_token,
    grid,
    half,
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


REFERENCES: dict[str, tuple[str, Reference]] = {
    "vidkv": ("vidkv[group_size=8,residual=16]", vidkv),
    "vidkv_salient": ("vidkv[group_size=8,residual=16,salient=0.8]", vidkv_salient),
    "vidkv_shipped": ("vidkv_as_shipped[group_size=8,residual=16]", vidkv_as_shipped),
    "calibquant": ("calibquant[calibrate=false]", calibquant),
    "akvq_text": ("akvq_vl[recent=8,pivots=3,group_size=8]", akvq_text_salient),
    "akvq_pivot": ("akvq_vl[recent=8,pivots=3,group_size=8]", akvq_pivot_salient),
}
