"""Codes in bytes, lowest bits first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvbench.cache.packing import check_packable, pack, unpack
from kvbench.errors import UserError


@st.composite
def codes(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    bits = draw(st.sampled_from([1, 2, 4, 8]))
    rows, per_row = draw(st.integers(0, 4)), draw(st.integers(1, 5)) * 8 // bits
    elements = st.integers(0, 2**bits - 1)
    return bits, draw(hnp.arrays(np.uint8, (rows, 2, per_row), elements=elements))


@settings(max_examples=100, deadline=None)
@given(codes())
def test_round_trip_and_size(case: tuple[int, np.ndarray]) -> None:
    bits, values = case
    packed = pack(torch.from_numpy(values), bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == values.size * bits
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


def test_packing_leaves_its_input_alone() -> None:
    values = torch.arange(16, dtype=torch.uint8) % 4
    before = values.clone()
    pack(values, 2)
    assert torch.equal(values, before)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="packed"):
        check_packable(bits, 64)


@pytest.mark.parametrize(("bits", "length"), [(1, 12), (2, 6), (4, 3)])
def test_codes_must_fill_their_bytes(bits: int, length: int) -> None:
    with pytest.raises(UserError, match="whole bytes"):
        check_packable(bits, length)
    check_packable(bits, length * 8)
