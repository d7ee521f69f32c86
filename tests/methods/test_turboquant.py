"""Codebooks against their definition, published tables and error levels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate

from kvbench.cache import EXACT, LayerSpec, Uniform
from kvbench.errors import UserError
from kvbench.methods.turboquant import Codebook, TurboQuant, lloyd_max
from kvbench.registry import METHODS

GAUSSIAN = {
    1: [0.797885],
    2: [0.452780, 1.510418],
    3: [0.245094, 0.756005, 1.343909, 2.151946],
    4: [0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590],
}
SPHERE = {
    64: {2: [0.45212, 1.49997], 3: [0.24375, 0.75066, 1.32934, 2.11131]},
    128: {2: [0.45245, 1.50519], 3: [0.24442, 0.75333, 1.33660, 2.13147]},
    256: {1: [0.79866], 3: [0.24476, 0.75467, 1.34025, 2.14167]},
}
PRESETS = {
    "turboquant_k8v4": 196,
    "turboquant_4bit_nc": 134,
    "turboquant_k3v4_nc": 118,
    "turboquant_3bit_nc": 102,
}


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_gaussian_centroids_are_the_known_ones(bits: int) -> None:
    centroids = lloyd_max(bits, "gaussian")
    np.testing.assert_allclose(centroids[2 ** (bits - 1) :], GAUSSIAN[bits], atol=1e-4)
    np.testing.assert_allclose(centroids, -np.array(centroids[::-1]), atol=1e-12)


@pytest.mark.parametrize(("order", "bits"), [(d, b) for d, table in SPHERE.items() for b in table])
def test_centroids_of_the_sphere_are_the_known_ones(order: int, bits: int) -> None:
    centroids = lloyd_max(bits, "sphere", order)
    np.testing.assert_allclose(centroids[2 ** (bits - 1) :], SPHERE[order][bits], atol=1e-4)


@pytest.mark.parametrize("order", [0, 16, 80, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_centroids_are_fixed_points(order: int, bits: int) -> None:
    """Each is the mean of the density between the middles to its neighbours."""
    law = "sphere" if order else "gaussian"
    centroids = np.array(lloyd_max(bits, law, order))  # type: ignore[arg-type]
    far = np.sqrt(order) if order else 12.0
    edges = np.concatenate(([-far], (centroids[1:] + centroids[:-1]) / 2, [far]))

    def density(x: float) -> float:
        if not order:
            return float(np.exp(-x * x / 2))
        return float(max(1 - x * x / order, 0) ** ((order - 3) / 2))

    for low, high, centroid in zip(edges, edges[1:], centroids, strict=False):
        mass = integrate.quad(density, low, high, epsabs=1e-13)[0]
        moment = integrate.quad(lambda x: x * density(x), low, high, epsabs=1e-13)[0]
        assert moment / mass == pytest.approx(centroid, abs=1e-6)


def rows(count: int = 4000, width: int = 128) -> torch.Tensor:
    return torch.randn(1, 1, count, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "corrected", "expected"),
    [
        *((2, False, 0.116), (3, False, 0.0340), (4, False, 0.0093), (1, False, 0.3609)),
        *((2, True, 0.119), (3, True, 0.0338), (4, True, 0.0092)),
    ],
)
def test_errors_on_gaussian_rows(bits: int, corrected: bool, expected: float) -> None:
    codec, x = Codebook(bits, corrected, "sphere"), rows()
    back = codec.decode(codec.encode(x), torch.float32)
    error = (back - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(expected, rel=0.02)
    if corrected:
        torch.testing.assert_close(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_zero_constant_and_huge_rows_stay_finite(bits: int, corrected: bool) -> None:
    x = torch.zeros(1, 1, 6, 64)
    x[0, 0, 1], x[0, 0, 2], x[0, 0, 3], x[0, 0, 4, 5] = 3.0, 1e4 / 8, 1e30, 1e-30
    codec = Codebook(bits, corrected)
    back = codec.decode(codec.encode(x), torch.float32)
    assert back.isfinite().all()
    assert (back[0, 0, 0] == 0).all()
    if corrected:
        assert float(back[0, 0, 2].norm()) == pytest.approx(1e4, rel=1e-3)


def test_ties_go_up() -> None:
    """A unit vector with a zero coordinate lies on the middle boundary."""
    codec = Codebook(1, norm_correction=False)
    x = torch.zeros(1, 1, 1, 16)
    x[..., 0] = -1.0
    back = codec.decode(codec.encode(x), torch.float32)[0, 0, 0]
    assert back[0] < 0 and (back[1:] > 0).all()


@pytest.mark.parametrize(("name", "slot"), PRESETS.items())
def test_slots_have_vllms_bytes(name: str, slot: int, driver, random_states) -> None:
    method: TurboQuant = METHODS.get(name)  # type: ignore[assignment]
    spec = LayerSpec(5, 32, 4, 2, 128)
    drive = driver(method, spec, "quantized_prefill")
    drive.step(*(x.bfloat16() for x in random_states(9, width=128)))
    assert drive.layer.nbytes == 9 * 2 * slot
    codecs = (method.layer(spec, None).key.codecs, method.layer(spec, None).value.codecs)
    bits = sum(codec.bits_per_element(128) for side in codecs for codec in side.values()) / 2
    assert bits == 8 * slot / 256
    # Two layers at either end in 16 bits: the model's bits at 32 layers.
    expected = {196: 7.36, 134: 5.66, 118: 5.23, 102: 4.79}[slot]
    layers = [method.layer(LayerSpec(i, 32, 4, 2, 128), None) for i in range(32)]
    skipped = sum(layer.is_exact for layer in layers)
    assert (16 * skipped + (32 - skipped) * bits) / 32 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("layers", "skip", "exact"),
    [(8, 2, [0, 1, 6, 7]), (3, 2, [0, 2]), (2, 5, [0, 1]), (4, 0, []), (1, 2, [])],
)
def test_ends_of_the_model_stay_exact(layers: int, skip: int, exact: list[int]) -> None:
    method = TurboQuant(skip_layers=skip)
    found = [method.layer(LayerSpec(i, layers, 4, 2, 16), None) for i in range(layers)]
    assert [i for i, layer in enumerate(found) if layer.plan == Uniform(EXACT)] == exact


def test_three_bits_need_eights_of_channels() -> None:
    with pytest.raises(UserError, match="65 channels of 3 bits"):
        Codebook(3).check(65)
    with pytest.raises(UserError, match="order 65"):
        TurboQuant().layer(LayerSpec(5, 32, 4, 2, 65), None)
