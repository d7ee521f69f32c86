"""8- and 4-bit floats against tables of their numbers."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from kvbench.cache import Float8, LayerSpec
from kvbench.errors import UserError
from kvbench.methods.nvfp4 import NVFP4, Float4

E4M3 = sorted(
    {
        sign * (mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
        for sign, exponent, mantissa in product((1, -1), range(16), range(8))
        if (exponent, mantissa) != (15, 7)
    }
)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(x: np.ndarray, numbers: list[float]) -> np.ndarray:
    """The nearest of ascending numbers."""
    table = np.asarray(numbers)
    return table[np.abs(x[..., None] - table).argmin(-1)]


def gaussian(rows: int, width: int = 128) -> torch.Tensor:
    return torch.randn(1, 1, rows, width, generator=torch.Generator().manual_seed(0))


def test_static_float8_saturates_and_is_the_nearest_number() -> None:
    x = torch.linspace(-901.3, 899.7, 4001).view(1, 1, 1, -1)
    codec = Float8(2.0)
    packed = codec.encode(x)
    assert len(packed) == 1 and packed[0].dtype == torch.uint8
    got = codec.decode(packed, torch.float64)
    expected = 2 * nearest(x.double().numpy() / 2, E4M3)
    np.testing.assert_allclose(got, expected)
    assert codec.decode(codec.encode(x * 1e30), torch.float32).abs().max() == 896
    assert codec.bits_per_element(128) == 8.0


def test_a_scale_of_its_own_reproduces_the_largest_number() -> None:
    x = gaussian(200) * torch.logspace(-3, 4, 200)[:, None]
    codes, scale = Float8().encode(x)
    assert codes.shape == (1, 1, 200, 128) and scale.shape == (1, 1, 200, 1)
    assert scale.dtype == torch.float32
    back = Float8().decode((codes, scale), torch.float32)
    torch.testing.assert_close(back.abs().amax(-1), x.abs().amax(-1), rtol=1e-6, atol=0)
    assert Float8().bits_per_element(128) == 8.25


def test_errors_on_gaussian_rows_are_those_of_the_formats() -> None:
    x = gaussian(2000)
    scale = float(x.abs().max()) / 448
    for codec, expected, near in ((Float8(), 7e-4, 5e-5), (Float4(scale), 0.0090, 2e-4)):
        error = (codec.decode(codec.encode(x), torch.float32) - x).square().sum() / x.square().sum()
        assert float(error) == pytest.approx(expected, abs=near)


@pytest.mark.parametrize("codec", [Float8(), Float8(1.0), Float8(kind="e5m2"), Float4(1.0)])
def test_zero_constant_and_huge_rows_stay_finite(codec: Float8 | Float4) -> None:
    x = torch.zeros(1, 1, 6, 32)
    x[0, 0, 1], x[0, 0, 2], x[0, 0, 3], x[0, 0, 4, 5] = 3.0, 1e30, 1e-30, -1e4
    back = codec.decode(codec.encode(x), torch.float32)
    assert back.isfinite().all()
    assert (back[0, 0, 0] == 0).all()
    torch.testing.assert_close(back[0, 0, 1], x[0, 0, 1])


def test_two_levels_decode_as_a_table_of_all_codes() -> None:
    """Sixteen codes under every scale that a block can have."""
    scales = np.array([s for s in E4M3 if s >= 0])
    numbers = np.array(E2M1 + [-x for x in E2M1])
    x = torch.from_numpy(scales[:, None] * numbers).float() * 0.5
    codec = Float4(0.5)
    packed = codec.encode(x[None, None])
    assert packed[0].shape == (1, 1, len(scales), 8) and packed[1].shape == (1, 1, len(scales), 1)
    torch.testing.assert_close(codec.decode(packed, torch.float32)[0, 0], x, rtol=0, atol=0)


def test_ties_between_four_bit_floats_go_to_the_even_code() -> None:
    x = torch.zeros(1, 1, 1, 16)
    x[..., :8] = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    got = Float4(1.0).decode(Float4(1.0).encode(-x), torch.float32)[0, 0, 0, :8]
    assert (-got).tolist() == [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_a_scale_six_times_off_is_seen() -> None:
    """What a writer and a reader of different conventions would do."""
    x = gaussian(500)
    scale = float(x.abs().max()) / 448
    packed = Float4(scale).encode(x)
    for other, right in ((scale, True), (scale / 6, False), (scale * 6, False)):
        error = (Float4(other).decode(packed, torch.float32) - x).norm() / x.norm()
        assert (error < 0.15) == right


def test_blocks_of_sixteen_must_fit() -> None:
    with pytest.raises(UserError, match="65 can't be cut"):
        Float4(1.0).check(65)


def test_nvfp4_takes_the_scale_it_is_given() -> None:
    layer = NVFP4(static=2.0).layer(LayerSpec(0, 1, 4, 2, 32), None)
    assert layer.key.codecs == {4: Float4(2.0)} == layer.value.codecs
    assert NVFP4(static=2.0).needs.statistics == ()
    with pytest.raises(UserError, match=r"static=1\.0"):
        NVFP4().layer(LayerSpec(0, 1, 4, 2, 32), None)
