"""Group quantizers against their formulas, written out in numpy float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvbench.cache import Affine
from kvbench.cache.codecs import check_packable
from kvbench.errors import UserError
from kvbench.kernels.packing import unpack

KINDS = ("int", "float", "symmetric")
METADATA = [("int", "fp16"), ("float", "fp16"), ("symmetric", "fp16"), ("float", "fp8")]
LAYOUTS: dict[str, Any] = {
    "one_group": dict(group=16),
    "small_groups": dict(group=4),
    "uneven_groups": dict(group=(3, 8, 1, 4)),
    "tokens": dict(group=6, along="tokens"),
}
FORMULAS = [
    *(
        (layout, zero, mode)
        for layout in LAYOUTS
        for zero in KINDS[:2]
        for mode in ("scale", "midpoint")
    ),
    ("one_group", "symmetric", "scale"),
    ("small_groups", "symmetric", "scale"),
]
SHAPE = (2, 3, 12, 16)  # rows, heads, tokens, channels


def half(x: np.ndarray) -> np.ndarray:
    """As stored."""
    return np.asarray(x, dtype=np.float16).astype(np.float64)


def near_tie(x: float) -> bool:
    """Whether float32 may round to another float16 than float64 does."""
    steps = x / float(np.spacing(np.float16(x)))
    return bool(abs(steps - np.floor(steps) - 0.5) < 0.005)


def by_formula(
    x: np.ndarray, bits: int, zero: str, clip: float, clip_mode: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One group of any shape: codes, decoded values, and each value's distance from a tie."""
    low, high, levels = x.min(), x.max(), 2**bits - 1
    if zero == "symmetric":
        half_levels = 2 ** (bits - 1)
        scale = half(max(-low, high) * clip / max(half_levels - 1, 1))
        steps = x / scale
        codes = np.clip(np.rint(steps), -half_levels, half_levels - 1)
        unsure = near_tie(max(-low, high) * clip / max(half_levels - 1, 1))
        margin = np.abs(steps - np.floor(steps) - 0.5) * (not unsure)
        return codes + half_levels, codes * scale, margin
    if clip_mode == "midpoint":
        middle, reach = (low + high) / 2, (high - low) / 2 * clip
        low, high = middle - reach, middle + reach
    else:
        low, high = low * clip, high * clip
    scale = half((high - low) / levels)
    sure = not near_tie((high - low) / levels) and not near_tie(low)
    if zero == "float":
        minimum = half(low)
        steps = (x - minimum) / scale
        codes = np.clip(np.rint(steps), 0, levels)
        return codes, codes * scale + minimum, np.abs(steps - np.floor(steps) - 0.5) * sure
    offset = np.rint(-low / scale)
    steps = x / scale
    codes = np.clip(np.rint(steps) + offset, 0, levels)
    sure = sure and abs(-low / scale - np.floor(-low / scale) - 0.5) > 1e-3
    return codes, scale * (codes - offset), np.abs(steps - np.floor(steps) - 0.5) * sure


def groups(layout: str) -> list[tuple[Any, ...]]:
    """Index of every group of an array of SHAPE."""
    rows, heads, tokens, channels = SHAPE
    places = [(b, h) for b in range(rows) for h in range(heads)]
    if layout == "tokens":
        return [
            (b, h, slice(t, t + 6), c)
            for b, h in places
            for t in range(0, tokens, 6)
            for c in range(channels)
        ]
    sizes = {"one_group": [16], "small_groups": [4] * 4, "uneven_groups": [3, 8, 1, 4]}[layout]
    ends = np.cumsum(sizes)
    return [
        (b, h, t, slice(end - size, end))
        for b, h in places
        for t in range(tokens)
        for size, end in zip(sizes, ends, strict=True)
    ]


def plain_codes(codec: Affine, packed: tuple[torch.Tensor, ...]) -> np.ndarray:
    """Codes of SHAPE, taken out of their bytes one by one."""
    per_byte = 8 // codec.bits
    data = packed[0].numpy().astype(np.int64)
    lanes = [(data >> (codec.bits * lane)) & (2**codec.bits - 1) for lane in range(per_byte)]
    return np.concatenate(lanes, -1).reshape(SHAPE)


def data(seed: int = 0) -> np.ndarray:
    """Normal numbers; heads differ in scale and offset, so that no group is like another."""
    source = np.random.default_rng(seed)
    scale = source.uniform(0.1, 20, (*SHAPE[:2], 1, 1))
    offset = source.uniform(-3, 3, (*SHAPE[:2], 1, 1)) * scale
    return (source.standard_normal(SHAPE) * scale + offset).astype(np.float32)


@pytest.mark.parametrize("clip", [1.0, 0.8])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("layout", "zero", "clip_mode"), FORMULAS)
def test_codes_and_values_follow_the_formula(
    layout: str, zero: str, clip_mode: str, bits: int, clip: float
) -> None:
    codec = Affine(bits, zero=zero, clip=clip, clip_mode=clip_mode, **LAYOUTS[layout])  # type: ignore[arg-type]
    codec.check(SHAPE[3])
    x = data()
    packed = codec.encode(torch.from_numpy(x))
    codes, decoded = plain_codes(codec, packed), codec.decode(packed, torch.float32).numpy()
    ties = 0
    for index in groups(layout):
        if x[index].size == 1 and zero != "symmetric":
            np.testing.assert_allclose(decoded[index], half(x[index]), rtol=1e-6)
            continue
        expected, values, margin = by_formula(
            x[index].astype(np.float64), bits, zero, clip, clip_mode
        )
        clear = margin > 1e-4  # float32 may fall on the other side of a tie
        ties += int((~clear).sum())
        np.testing.assert_array_equal(codes[index][clear], expected[clear])
        np.testing.assert_allclose(decoded[index][clear], values[clear], rtol=1e-5, atol=1e-5)
    assert ties < 0.1 * x.size


def test_code_width_is_what_was_asked_for() -> None:
    codec = Affine(2, 16)
    assert codec.encode(torch.randn(SHAPE))[0].shape == (2, 3, 12, 4)
    assert codec.block == 1
    tokens = Affine(4, 6, along="tokens")
    assert tokens.encode(torch.randn(SHAPE))[0].shape == (2, 3, 2, 6, 8)
    assert tokens.block == 6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("zero", "metadata"), METADATA)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_stored_bytes_equal_bits_per_element(
    bits: int, zero: str, metadata: str, layout: str
) -> None:
    codec = Affine(bits, zero=zero, metadata=metadata, **LAYOUTS[layout])  # type: ignore[arg-type]
    packed = codec.encode(torch.randn(SHAPE))
    stored = sum(part.numel() * part.element_size() for part in packed)
    assert 8 * stored == pytest.approx(codec.bits_per_element(16) * np.prod(SHAPE), rel=1e-12)
    numbers_a_group = np.prod(SHAPE) / len(groups(layout))
    per_group = {"symmetric": 16}.get(zero, 16 if metadata == "fp8" else 32)
    assert codec.bits_per_element(16) == pytest.approx(bits + per_group / numbers_a_group)


finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@given(
    hnp.arrays(np.float32, (1, 1, 3, 8), elements=finite),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["int", "float"]),
    st.sampled_from(["scale", "midpoint"]),
    st.floats(0.3, 1.0),
)
def test_errors_stay_within_half_a_step_of_the_stored_range(
    x: np.ndarray, bits: int, zero: str, clip_mode: str, clip: float
) -> None:
    codec = Affine(bits, 8, zero=zero, clip=clip, clip_mode=clip_mode)  # type: ignore[arg-type]
    packed = codec.encode(torch.from_numpy(x))
    decoded = codec.decode(packed, torch.float64).numpy()
    scale = packed[1].double().numpy()
    offset = packed[2].double().numpy()
    first = -scale * offset if zero == "int" else offset
    last = first + scale * (2**bits - 1)
    assert np.isfinite(decoded).all()
    wanted = np.clip(x.astype(np.float64), first, last)
    largest = np.abs(x).max(-1, keepdims=True)
    constant = (clip * np.ptp(x, axis=-1, keepdims=True) / (2**bits - 1)).astype(np.float16) == 0
    slack = np.where(constant, 1e-3 * largest, 0) + 1e-5 * largest + 1e-6
    assert (np.abs(decoded - wanted) <= scale / 2 + slack).all()


@given(hnp.arrays(np.float32, (1, 2, 4, 8), elements=finite), st.sampled_from([2, 4, 8]))
def test_the_float_offset_reproduces_both_ends(x: np.ndarray, bits: int) -> None:
    codec = Affine(bits, 8, zero="float")
    decoded = codec.decode(codec.encode(torch.from_numpy(x)), torch.float64).numpy()
    room = np.abs(x).max(-1) * 2e-3 + 2.0**-24 * 2**bits
    assert (np.abs(decoded.min(-1) - x.min(-1)) <= room).all()
    assert (np.abs(decoded.max(-1) - x.max(-1)) <= room).all()


CONSTANTS = [
    *(
        (value, "fp16")
        for value in (0.0, 1.0, -3.7, 2.0**-24, -(2.0**-20), 1e-30, 1000.25, -65504.0)
    ),
    *((value, "fp8") for value in (0.0, 1.0, -3.7, 1e-30, -448.0)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero", ["int", "float"])
@pytest.mark.parametrize(("value", "metadata"), CONSTANTS)
@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_constant_groups_are_kept_as_they_are(
    value: float, metadata: str, zero: str, layout: str, clip: float
) -> None:
    """max = min gives 0 / 0 by the formulas; clipping would move the constant."""
    zero = "float" if metadata == "fp8" else zero
    codec = Affine(2, zero=zero, clip=clip, metadata=metadata, **LAYOUTS[layout])  # type: ignore[arg-type]
    x = torch.full(SHAPE, value)
    decoded = codec.decode(codec.encode(x), torch.float32)
    kept = x.to(torch.float8_e4m3fn).float() if metadata == "fp8" else x.half().float()
    assert torch.equal(decoded, kept)


EXTREMES = {
    "huge": [3e38, -3e38, 1e30, 0.0],
    "beyond_half": [1e5, 9e4, 7e4, 8e4],
    "negative_beyond_half": [-1e5, -9e4, -7e4, -8e4],
    "tiny": [1e-40, -1e-40, 3e-39, 0.0],
    "below_half": [1e-8, -2e-8, 3e-8, 0.0],
    "smallest_step": [0.0, 6e-8, 1.2e-7, 1.8e-7],
    "nearly_constant": [1000.0, 1000.001, 1000.002, 999.999],
    "nearly_constant_negative": [-5.0, -5.00001, -5.00002, -5.0],
    "mixed_sizes": [1e4, 1e-4, -1e-4, 0.0],
    "one_outlier": [0.01, 0.02, 0.01, 60000.0],
}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.8, 1e-6])
@pytest.mark.parametrize(("zero", "metadata"), METADATA)
@pytest.mark.parametrize("name", EXTREMES)
def test_nothing_finite_becomes_nan_or_infinite(
    name: str, zero: str, metadata: str, clip: float, bits: int
) -> None:
    x = torch.tensor(EXTREMES[name]).repeat(4).view(1, 1, 1, 16)
    codec = Affine(bits, 8, zero=zero, clip=clip, metadata=metadata)  # type: ignore[arg-type]
    packed = codec.encode(x)
    decoded = codec.decode(packed, torch.float64)
    assert decoded.isfinite().all()
    assert all(part.float().isfinite().all() for part in packed[1:])
    largest = float(x.abs().max())
    if largest <= (448 if metadata == "fp8" else 65504) and clip == 1.0 and bits > 1:
        limit = float(x.max() - x.min()) + largest * (0.07 if metadata == "fp8" else 1e-3)
        assert float((decoded - x).abs().max()) <= limit + 1e-7


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("zero", ["int", "float"])
def test_groups_of_one_sign_use_all_their_codes(zero: str, sign: float) -> None:
    """A zero point held to [0, 3] would put 10, 11, 12, 13 all on the last code."""
    x = sign * torch.tensor([10.0, 11.0, 12.0, 13.0]).repeat(4).view(1, 1, 1, 16)
    codec = Affine(2, 16, zero=zero)  # type: ignore[arg-type]
    packed = codec.encode(x)
    assert sorted(set(unpack(packed[0], 2).flatten().tolist())) == [0, 1, 2, 3]
    assert torch.equal(codec.decode(packed, torch.float32), x)


def test_clipping_about_zero_and_about_the_middle_differ() -> None:
    x = torch.tensor([10.0, 11.0, 12.0, 14.0]).repeat(2).view(1, 1, 1, 8)
    ends = {}
    for mode in ("scale", "midpoint"):
        codec = Affine(8, 8, zero="float", clip=0.5, clip_mode=mode)  # type: ignore[arg-type]
        decoded = codec.decode(codec.encode(x), torch.float32)
        ends[mode] = float(decoded.min()), float(decoded.max())
    assert ends["scale"] == pytest.approx((7.0, 7.0), abs=0.02)  # 10 to 14 lie above 0.5 * 14
    assert ends["midpoint"] == pytest.approx((11.0, 13.0), abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_come_back_in_the_models_dtype(dtype: torch.dtype) -> None:
    for zero in KINDS:
        codec = Affine(4, 16, zero=zero)  # type: ignore[arg-type]
        x = torch.randn(SHAPE).to(dtype)
        assert codec.decode(codec.encode(x), dtype).dtype == dtype


def test_float8_metadata_moves_codes_not_only_values() -> None:
    """Codes are computed with the metadata as stored, so rounding it costs no more than a step."""
    x = torch.from_numpy(data(3))
    codec = Affine(4, 16, zero="float", metadata="fp8")
    packed = codec.encode(x)
    assert {part.element_size() for part in packed} == {1}
    scale, minimum = (part.view(torch.float8_e4m3fn).float() for part in packed[1:])
    inside = (x >= minimum) & (x <= minimum + 15 * scale)
    error = (codec.decode(packed, torch.float32) - x).abs()
    assert inside.float().mean() > 0.7
    assert (error <= scale / 2 * 1.001)[inside].all()


@pytest.mark.parametrize(
    "values",
    [
        dict(bits=2, group=0),
        dict(bits=2, group=-4),
        dict(bits=2, group=8, clip=0.0),
        dict(bits=2, group=8, clip=1.01),
        dict(bits=2, group=8, clip=float("nan")),
        dict(bits=2, group=8, clip=float("inf")),
        dict(bits=2, group=8, metadata="fp8"),
        dict(bits=2, group=8, metadata="fp8", zero="symmetric"),
        dict(bits=2, group=8, metadata="fp4"),
        dict(bits=2, group=8, zero="integer"),
        dict(bits=2, group=8, clip_mode="middle"),
        dict(bits=2, group=8, along="heads"),
        dict(bits=2, group=(3, 5), along="tokens"),
        dict(bits=2.0, group=8),
        dict(bits="2", group=8),
        dict(bits=True, group=8),
    ],
)
def test_bad_parameters_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Affine(**values)


@pytest.mark.parametrize(
    ("bits", "group", "channels"),
    [(3, 8, 8), (16, 8, 8), (0, 8, 8), (2, 5, 8), (2, (3, 4), 8), (1, 4, 4), (2, 2, 2), (4, 1, 1)],
)
def test_vectors_that_do_not_fit_are_refused(bits: int, group: Any, channels: int) -> None:
    with pytest.raises(UserError):
        Affine(bits, group).check(channels)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="packed"):
        check_packable(bits, 64)


@pytest.mark.parametrize(("bits", "length"), [(1, 12), (2, 6), (4, 3)])
def test_codes_must_fill_their_bytes(bits: int, length: int) -> None:
    with pytest.raises(UserError, match="whole bytes"):
        check_packable(bits, length)
    check_packable(bits, length * 8)
