"""What holds for every group quantizer on any finite numbers, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvbench.cache import Affine

SHAPE = (2, 1, 4, 16)  # rows, heads, tokens, channels
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_group": {"group": 16},
    "small_groups": {"group": 4},
    "uneven_groups": {"group": (3, 13)},
    "tokens": {"group": 2, "along": "tokens"},
}
HALF_ROUNDING, HALF_QUANTUM = 2.0**-11, 2.0**-25  # of float16: relative, and below its normals
halves = st.floats(width=16, allow_nan=False, allow_infinity=False)
singles = st.floats(width=32, allow_nan=False, allow_infinity=False)
layouts = st.sampled_from(sorted(LAYOUTS))
widths = st.sampled_from([1, 2, 4, 8])


def numbers(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    """Arrays of SHAPE: independent numbers, or groups with an offset, a scale and an outlier."""
    plain = hnp.arrays(np.float32, SHAPE, elements=elements, fill=elements)
    seeds = st.integers(0, 2**32 - 1)
    return plain | st.builds(_clustered, seeds, elements, elements)


def _clustered(seed: int, offset: float, outlier: float) -> np.ndarray:
    source = np.random.default_rng(seed)
    x = offset + source.standard_normal(SHAPE) * 10.0 ** source.uniform(-8, 3)
    x[tuple(source.integers(0, SHAPE))] = outlier
    largest = max(abs(offset), abs(outlier), 1.0)
    return np.clip(x, -largest, largest).astype(np.float32)


def groups(x: np.ndarray, layout: str) -> list[np.ndarray]:
    """The members of every group, in the same order for arrays of one shape."""
    if layout == "tokens":
        return [
            x[b, h, t : t + 2, c]
            for b, h, t, c in np.ndindex(*SHAPE[:2], SHAPE[2] - 1, SHAPE[3])
            if t % 2 == 0
        ]
    sizes = {"one_group": [16], "small_groups": [4] * 4, "uneven_groups": [3, 13]}[layout]
    ends = np.cumsum(sizes)
    rows = x.reshape(-1, SHAPE[3])
    return [row[e - n : e] for row in rows for n, e in zip(sizes, ends, strict=True)]


def codec(layout: str, bits: int, zero: str, **more: Any) -> Affine:
    return Affine(bits, zero=zero, **LAYOUTS[layout], **more)  # type: ignore[arg-type]


def round_trip(method: Affine, x: np.ndarray) -> np.ndarray:
    packed = method.encode(torch.from_numpy(x))
    return method.decode(packed, torch.float64).numpy()


def bound(low: float, high: float, bits: int, zero: str) -> tuple[float, float]:
    """By the formulas alone: a group's step, and how far off a number between its ends may be.

    Half a step; what float16 loses of the scale, counted once a level, and of the minimum; what
    lies beyond float16; and float32's own rounding of large numbers.
    """
    largest, levels = max(-low, high, 0.0), 2**bits - 1
    if zero == "symmetric":
        levels = max(2 ** (bits - 1) - 1, 1)
        step = max(max(largest, 1e-5) / levels, 2.0**-24)
        meta = levels * max(step * HALF_ROUNDING, HALF_QUANTUM)
    else:
        step = (high - low) / levels
        meta = levels * max(step * HALF_ROUNDING, HALF_QUANTUM)
        constant = step < 2 * HALF_QUANTUM  # or may be, where the scale rounds to nothing
        meta += (high - low) / 2 if constant else 0
        meta += max(largest * HALF_ROUNDING, HALF_QUANTUM) if constant or zero == "float" else 0
        if zero == "int":  # int16 zero points: groups far from zero have wider steps
            step = max(step, abs(low) / 32000)
    beyond = levels * max(step - 65504.0, 0.0)
    return step, step / 2 * (1 + 4 * HALF_ROUNDING) + meta + beyond + 4e-6 * largest


@given(numbers(halves), layouts, widths, st.sampled_from(["int", "float"]))
def test_numbers_are_off_by_half_a_step_and_the_metadata(
    x: np.ndarray, layout: str, bits: int, zero: str
) -> None:
    decoded = round_trip(codec(layout, bits, zero), x)
    for group, found in zip(groups(x, layout), groups(decoded, layout), strict=True):
        wide = group.astype(np.float64)
        _, allowed = bound(wide.min(), wide.max(), bits, zero)
        assert np.abs(found - wide).max() <= allowed


@given(numbers(halves), layouts, st.sampled_from([2, 4, 8]))
def test_symmetric_numbers_are_off_by_half_a_step(x: np.ndarray, layout: str, bits: int) -> None:
    decoded = round_trip(codec(layout, bits, "symmetric"), x)
    for group, found in zip(groups(x, layout), groups(decoded, layout), strict=True):
        wide = group.astype(np.float64)
        _, allowed = bound(wide.min(), wide.max(), bits, "symmetric")
        assert np.abs(found - wide).max() <= allowed


@given(
    numbers(st.floats(-1e4, 1e4, width=16)),
    layouts,
    widths,
    st.sampled_from(["int", "float"]),
    st.floats(0.3, 1.0),
)
def test_what_clipping_leaves_inside_is_off_by_half_a_step(
    x: np.ndarray, layout: str, bits: int, zero: str, clip: float
) -> None:
    """The clipped range is narrower, so its step is finer; outside, the nearer end is given, or
    something between it and the number where an integer zero point makes steps wider."""
    decoded = round_trip(codec(layout, bits, zero, clip=clip, clip_mode="midpoint"), x)
    for group, found in zip(groups(x, layout), groups(decoded, layout), strict=True):
        wide = group.astype(np.float64)
        middle, reach = (wide.max() + wide.min()) / 2, (wide.max() - wide.min()) / 2 * clip
        if reach < (2**bits) * 2 * HALF_QUANTUM + 1e-5 * abs(middle):
            continue  # may be stored as one constant, which is never clipped
        nearer = np.clip(wide, middle - reach, middle + reach)
        _, allowed = bound(middle - reach, middle + reach, bits, zero)
        allowed += 4e-6 * np.abs(wide).max()
        assert (found >= np.minimum(nearer, wide) - allowed).all()
        assert (found <= np.maximum(nearer, wide) + allowed).all()


@given(numbers(singles), layouts, widths, st.floats(1e-6, 1.0), st.data())
def test_no_finite_number_becomes_nan_or_infinite(
    x: np.ndarray, layout: str, bits: int, clip: float, data: st.DataObject
) -> None:
    zero = data.draw(st.sampled_from(["int", "float", "symmetric"]))
    metadata = data.draw(st.sampled_from(["fp16", "fp8"])) if zero == "float" else "fp16"
    mode = data.draw(st.sampled_from(["scale", "midpoint"]))
    method = codec(layout, bits, zero, clip=clip, clip_mode=mode, metadata=metadata)
    packed = method.encode(torch.from_numpy(x))
    assert all(part.float().isfinite().all() for part in packed)
    assert method.decode(packed, torch.float64).isfinite().all()


@pytest.mark.parametrize("zero", ["int", "float"])
@given(halves, layouts, widths, st.floats(0.3, 1.0))
def test_constants_are_exact(zero: str, value: float, layout: str, bits: int, clip: float) -> None:
    x = np.full(SHAPE, value, np.float32)
    assert np.array_equal(round_trip(codec(layout, bits, zero, clip=clip), x), x)


@pytest.mark.parametrize("zero", ["int", "float", "symmetric"])
@given(layouts, widths)
def test_zeros_are_exact(zero: str, layout: str, bits: int) -> None:
    x = np.zeros(SHAPE, np.float32)
    assert not round_trip(codec(layout, bits, zero), x).any()


@pytest.mark.parametrize("zero", ["int", "float", "symmetric"])
@given(numbers(st.floats(-3e4, 3e4, width=16)), st.sampled_from([2, 4, 8]))
def test_what_was_decoded_is_encoded_as_it_is(zero: str, x: np.ndarray, bits: int) -> None:
    """Exactly, where a group's step is a normal float16 and its zero point is within float32's
    reach; a group uses both its end codes then, so that its range is told again."""
    method = codec("one_group", bits, zero)
    first = method.encode(torch.from_numpy(x))
    once = method.decode(first, torch.float32)
    twice = method.decode(method.encode(once), torch.float32).numpy()
    scale = first[1].double().numpy()
    offset = np.abs(first[2].double().numpy()) if zero != "symmetric" else 0 * scale
    far = offset > (4000 if zero == "int" else 500 * scale)
    codes = once.double().numpy() / scale
    spread = np.rint(codes.max(-1, keepdims=True) - codes.min(-1, keepdims=True))
    full = spread == 2**bits - 1
    if zero == "symmetric":
        full = np.rint(np.abs(codes).max(-1, keepdims=True)) == 2 ** (bits - 1) - 1
    sure = full & ~far & (scale > 2.0**-14)
    assume(sure.any())
    same = (once.numpy() == twice).all(-1, keepdims=True)
    assert same[sure].all()
