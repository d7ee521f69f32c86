"""What SmoothQuant and SKVQ make of calibrated statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvbench.cache import Calibration, LayerSpec
from kvbench.errors import UserError
from kvbench.methods import skvq
from kvbench.methods.skvq import SKVQ
from kvbench.methods.smoothquant import SmoothQuant

SPEC = LayerSpec(1, 2, 4, 2, 16)


@pytest.fixture
def calibration() -> Calibration:
    source = torch.Generator().manual_seed(0)
    names = ("key", "query", "value")
    statistics = {f"{n}_absmax": torch.rand(2, 2, 16, generator=source) * 5 for n in names}
    statistics["output_weight_absmax"] = torch.rand(2, 2, 16, generator=source)
    for name in ("key", "value"):
        spread = torch.rand(2, 2, 16, generator=source) * 10
        statistics |= {f"{name}_min": -spread, f"{name}_max": spread * 1.5}
    return Calibration(statistics)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_follow_the_formula(calibration, alpha: float) -> None:
    """s = max|own|^alpha / max|partner|^(1 - alpha); storage holds x / s."""
    layer = SmoothQuant(alpha=alpha).layer(SPEC, calibration)
    for side, own, partner in (
        (layer.key, "key_absmax", "query_absmax"),
        (layer.value, "value_absmax", "output_weight_absmax"),
    ):
        first, second = (calibration.of(name, 1).double().numpy() for name in (own, partner))
        scale = first**alpha / second ** (1 - alpha)
        x = torch.randn(1, 2, 3, 16, dtype=torch.float64)
        stored = side.transform.store(x).numpy()
        np.testing.assert_allclose(stored, x.numpy() / scale[None, :, None], rtol=1e-5)


def test_dead_channels_are_floored(calibration) -> None:
    """A channel that was always zero in calibration may not be so later."""
    for name in ("key_absmax", "query_absmax"):
        calibration.statistics[name][1, 0, 3] = 0.0
    calibration.statistics["key_absmax"][1, 0, 4] = 0.0
    calibration.statistics["query_absmax"][1, 0, 4] = 1e9
    transform = SmoothQuant().layer(SPEC, calibration).key.transform
    stored = transform.store(torch.ones(1, 2, 1, 16, dtype=torch.float64))[0, 0, 0]
    assert float(stored[3]) == pytest.approx(1.0)  # sqrt(1e-5) / sqrt(1e-5)
    assert float(stored[4]) == pytest.approx(1e5)  # the floor of s itself
    assert stored.isfinite().all()


@pytest.mark.parametrize("method", [SmoothQuant(), SKVQ()])
def test_statistics_are_needed(method: Any) -> None:
    with pytest.raises(UserError, match="kvbench calibrate"):
        method.layer(SPEC, None)
    assert method.needs.statistics


def test_skvq_without_reordering_needs_none() -> None:
    method = SKVQ(reorder=False, group_size=12)
    assert method.needs.statistics == ()
    codec: Any = method.layer(SPEC, None).key.codecs[2]
    assert codec.group == (12, 12, 8)


@pytest.mark.parametrize("group_size", [4, 8, 12, 32, 128])
def test_channels_are_permuted_into_groups_that_cover_them(calibration, group_size: int) -> None:
    layer = SKVQ(group_size=group_size).layer(SPEC, calibration)
    flat = torch.arange(32.0).view(2, 16)
    for side in (layer.key, layer.value):
        codec: Any = side.codecs[2]
        assert sum(codec.group) == 32
        assert len(codec.group) <= -(-32 // min(group_size, 32))
        stored = side.transform.store(flat[None, :, None])
        assert stored.shape == (1, 1, 1, 32)
        assert sorted(stored.flatten().tolist()) == list(range(32))
        assert torch.equal(side.transform.read(stored)[0, :, 0], flat)


def test_similar_channels_share_a_group() -> None:
    """Three kinds of channel, far apart: groups are the kinds, whatever the order they came in."""
    kinds = np.random.default_rng(0).permutation([0] * 20 + [1] * 9 + [2] * 3)
    spread = torch.from_numpy(10.0**kinds).float().view(1, 2, 16).expand(2, -1, -1)
    ends = {
        f"{s}_{e}": sign * spread for s in ("key", "value") for e, sign in (("min", -1), ("max", 1))
    }
    layer = SKVQ(group_size=11).layer(SPEC, Calibration(ends))
    codec: Any = layer.key.codecs[2]
    stored = layer.key.transform.store(torch.from_numpy(kinds).view(1, 2, 1, 16).double()).flatten()
    ends_of_groups = np.cumsum(codec.group)
    assert sorted(codec.group) == [3, 9, 20]
    for group in np.split(stored.numpy(), ends_of_groups[:-1]):
        assert len(set(group.tolist())) == 1


def test_clusters_repeat_and_follow_the_seed(calibration) -> None:
    def order(seed: int) -> list[float]:
        skvq._kmeans.cache_clear()
        transform = SKVQ(group_size=4, seed=seed).layer(SPEC, calibration).key.transform
        stored: list[float] = (
            transform.store(torch.arange(32.0).view(1, 2, 1, 16)).flatten().tolist()
        )
        return stored

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_keys_and_values_have_their_own_order(calibration) -> None:
    layer = SKVQ(group_size=4).layer(SPEC, calibration)
    x = torch.arange(32.0).view(1, 2, 1, 16)
    assert not torch.equal(layer.key.transform.store(x), layer.value.transform.store(x))
    assert layer.key.pre_rope
    assert not layer.value.pre_rope


def test_channels_that_are_all_alike_make_one_group() -> None:
    same = {f"{s}_{e}": torch.ones(2, 2, 16) for s in ("key", "value") for e in ("min", "max")}
    codec: Any = SKVQ(group_size=8).layer(SPEC, Calibration(same)).key.codecs[2]
    assert sum(codec.group) == 32
    codec.check(32)
