"""Methods whose levels are not evenly spaced, each written out again."""

from __future__ import annotations

import functools

import numpy as np
from scipy.integrate import cumulative_trapezoid

from tests.methods.stepwise import (
    ROTATION,
    STATISTICS,
    WIDTH,
    Array,
    Reference,
    Step,
    by_token,
    half,
)


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


REFERENCES: dict[str, tuple[str, Reference]] = {
    "fp8": ("fp8", fp8),
    "fp8_static": ("fp8[static=0.01]", fp8_static),
    "nvfp4": ("nvfp4", nvfp4),
    "turboquant": ("turboquant_k3v4_nc", turboquant),
    "turboquant_k8v4": ("turboquant_k8v4", turboquant_k8v4),
    "turboquant_paper": ("turboquant_paper[bits=2,rotation=hadamard]", turboquant_paper),
}
