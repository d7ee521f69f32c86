"""RotateKV's groups of heads and its divisor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from kvbench.cache import Calibration, LayerSpec
from kvbench.errors import UserError
from kvbench.methods.rotatekv import HeadGroups, RotateKV, SquaredDivisor


@pytest.mark.parametrize(("heads", "group"), [(8, 4), (4, 4), (6, 2), (2, 2), (3, 1), (1, 1)])
def test_heads_turn_in_the_largest_groups_that_divide_them(heads: int, group: int) -> None:
    spec = LayerSpec(0, 1, heads, heads, 16)
    transform = RotateKV(reorder=False).layer(spec, None).key.transform
    x = torch.randn(2, heads, 5, 16, dtype=torch.float64)
    size = group * 16
    flat = x.transpose(1, 2).reshape(2, 5, -1, size).numpy() @ hadamard(size) / np.sqrt(size)
    expected = flat.reshape(2, 5, heads, 16).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(transform.store(x), expected, atol=1e-12)
    torch.testing.assert_close(transform.read(transform.store(x)), x)


def test_channels_are_sorted_by_the_rotated_mean() -> None:
    spec = LayerSpec(0, 1, 4, 4, 16)
    mean = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
    transform = RotateKV().layer(spec, Calibration({"key_mean": mean})).key.transform
    stored = transform.store(mean.double()[:, :, None])
    assert stored.shape == (1, 1, 1, 64)
    assert (stored.diff() >= 0).all()
    torch.testing.assert_close(transform.read(stored)[0, :, 0], mean[0].double())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_shipped_divisor_is_bits_squared_less_one(bits: int) -> None:
    spec = LayerSpec(0, 1, 4, 4, 16)
    method = RotateKV(bits=bits, reorder=False, compat_divisor=True, clip=1.0)
    [codec] = method.layer(spec, None).key.codecs.values()
    assert isinstance(codec, SquaredDivisor) == (bits == 3)
    x = torch.randn(1, 4, 30, 16, generator=torch.Generator().manual_seed(0))
    back = codec.decode(codec.encode(x), torch.float64).numpy()
    low, high = x.numpy().min(-1, keepdims=True), x.numpy().max(-1, keepdims=True)
    scale = ((high - low) / np.float32(bits**2 - 1)).astype(np.float16).astype(np.float64)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, 2**bits - 1)
    np.testing.assert_allclose(back, (codes - zero) * scale, atol=1e-6)


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.8), (3, 1.0), (4, 1.0)])
def test_the_authors_clip_follows_the_bits(bits: int, clip: float) -> None:
    spec = LayerSpec(0, 1, 4, 4, 16)
    for given, expected in ((None, clip), (0.8, 0.8), (0.9, 0.9)):
        layer = RotateKV(bits=bits, clip=given, reorder=False).layer(spec, None)
        codecs = [side.codecs[bits] for side in (layer.key, layer.value)]
        assert [codec.clip for codec in codecs] == [expected] * 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options", [dict(heads=3), dict(heads=0), dict(pivots=-1), dict(bits=8, compat_divisor=True)]
)
def test_nonsense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        RotateKV(**options)  # type: ignore[arg-type]


def test_groups_keep_lengths() -> None:
    x = torch.randn(1, 4, 7, 16, dtype=torch.float64)
    turned = HeadGroups(4, 16).store(x)
    norms = [y.transpose(1, 2).flatten(2).norm(dim=-1) for y in (x, turned)]
    torch.testing.assert_close(*norms)
