"""Codes in bytes, in planes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvbench.kernels.packing import pack, unpack


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """Any number of whole bytes, around the 8 and 16 that are moved at once; any leading shape."""
    bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    per_row = draw(st.integers(1, 40) | st.sampled_from([16, 32, 64, 128]))
    per_row *= 8 if bits == 3 else 8 // bits
    source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = source.integers(0, 2**bits, (*shape, per_row), dtype=np.uint8)
    return bits, values if draw(st.booleans()) else np.full_like(values, 2**bits - 1)


@given(codes())
def test_round_trip_and_size(case: tuple[int, np.ndarray]) -> None:
    bits, values = case
    packed = pack(torch.from_numpy(values), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == values.size * bits
    size = values.shape[-1] * bits // 8
    assert packed.shape == (*values.shape[:-1], size)
    # Byte j holds the codes j, j + m, j + 2m, ...; three bits, in words of their own, see below.
    for place in range(8 // bits if bits != 3 else 0):
        plane = values[..., place * size : (place + 1) * size]
        assert np.array_equal((packed.numpy() >> (bits * place)) & (2**bits - 1), plane)
    assert np.array_equal(unpack(packed, bits).numpy(), values)


@pytest.mark.parametrize(
    ("bits", "values", "byte"),
    [
        (1, [1, 0, 1, 1, 0, 0, 0, 1], 0b10001101),
        (2, [1, 2, 3, 0], 0b00111001),
        (4, [10, 3], 0b00111010),
        (8, [200], 200),
    ],
)
def test_lowest_bits_come_first(bits: int, values: list[int], byte: int) -> None:
    packed = pack(torch.tensor(values, dtype=torch.uint8), bits)
    assert packed.tolist() == [byte]


def test_eight_codes_of_three_bits_fill_three_bytes() -> None:
    """One little-endian number of 24 bits, the first code in its lowest."""
    values = torch.randint(0, 8, (5, 2, 24), dtype=torch.uint8)
    packed = pack(values, 3)
    assert packed.shape == (5, 2, 9)
    for row, some in zip(packed.view(-1, 3), values.view(-1, 8), strict=True):
        number = sum(code << (3 * place) for place, code in enumerate(some.tolist()))
        assert row.tolist() == list(number.to_bytes(3, "little"))


def test_packing_leaves_its_input_alone() -> None:
    values = torch.arange(16, dtype=torch.uint8) % 4
    before = values.clone()
    pack(values, 2)
    assert torch.equal(values, before)


def test_codes_of_a_byte_come_from_different_planes() -> None:
    """Byte j of m holds the codes j, j + m, j + 2m, ..."""
    values = torch.randint(0, 4, (3, 5, 48), dtype=torch.uint8)
    packed = pack(values, 2).int()
    for index in range(48):
        plane, byte = divmod(index, 12)
        assert torch.equal((packed[..., byte] >> (2 * plane)) & 3, values[..., index].int())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_views_are_unpacked_wherever_they_lie(bits: int) -> None:
    values = torch.randint(0, 2**bits, (4, 7, 128), dtype=torch.uint8)
    packed = pack(values, bits)
    crooked = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)
    crooked.copy_(packed)
    for view, expected in [
        (packed[:, 2:5], values[:, 2:5]),
        (packed[1:, 3], values[1:, 3]),
        (packed.transpose(0, 1), values.transpose(0, 1)),
        (crooked, values),
    ]:
        assert torch.equal(unpack(view, bits), expected)
