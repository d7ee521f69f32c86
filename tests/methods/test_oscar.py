"""OSCAR's rotations, clipping and bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvbench.cache import Affine, Calibration, LayerSpec
from kvbench.errors import UserError
from kvbench.methods.oscar import OSCAR, PercentileClipped, eigen_rotation

SPEC = LayerSpec(0, 1, 4, 2, 16)


def moments(width: int = 16) -> Calibration:
    x = torch.randn(1, 2, 50, width, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-1, 1, width)
    return Calibration({f"{s}_second_moment": x.mT @ x / 50 for s in ("query", "value")})


@pytest.mark.parametrize("width", [16, 64, 80, 128])
def test_rotations_are_orthogonal_and_level_the_moment(width: int) -> None:
    moment = moments(width).of("query_second_moment", 0).double()[0]
    turn = eigen_rotation(moment)
    np.testing.assert_allclose(turn.T @ turn, np.eye(width), atol=1e-9)
    turned = (turn.T @ moment @ turn).diagonal()
    np.testing.assert_allclose(turned, moment.trace() / width, rtol=1e-9)


def test_a_zero_moment_still_gives_a_rotation() -> None:
    turn = eigen_rotation(torch.zeros(16, 16, dtype=torch.float64))
    np.testing.assert_allclose(turn.T @ turn, np.eye(16), atol=1e-12)


def test_heads_share_a_rotation_or_have_their_own() -> None:
    x = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    moment = moments().of("query_second_moment", 0).double()
    shared = OSCAR().layer(SPEC, moments()).key.transform
    apart = OSCAR(per_head=True).layer(SPEC, moments()).key.transform
    torch.testing.assert_close(shared.store(x), x @ eigen_rotation(moment.mean(0)))
    for head in range(2):
        expected = x[:, head] @ eigen_rotation(moment[head])
        torch.testing.assert_close(apart.store(x)[:, head], expected)
    query = torch.randn(1, 4, 5, 16, dtype=torch.float64)
    for transform in (shared, apart):
        turned = transform.attend(query).unflatten(1, (2, 2)) @ transform.store(x)[:, :, None].mT
        torch.testing.assert_close(turned, query.unflatten(1, (2, 2)) @ x[:, :, None].mT)


@pytest.mark.parametrize(("keep", "rank"), [(0.96, 15), (0.92, 14), (0.5, 8), (1.0, 15), (0.01, 0)])
def test_rows_are_clamped_to_their_own_order_statistic(keep: float, rank: int) -> None:
    x = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(1))
    limit = x.abs().sort(-1).values[..., rank, None]
    mine = PercentileClipped(2, 16, zero="float", keep=keep).encode(x)
    plain = Affine(2, 16, zero="float").encode(x.clamp(-limit, limit))
    for one, other in zip(mine, plain, strict=True):
        assert torch.equal(one, other)


def test_errors_on_gaussian_rows() -> None:
    x = torch.randn(1, 1, 4000, 128, generator=torch.Generator().manual_seed(0))
    for keep, expected in ((0.0, 0.251), (1.0, 0.251), (0.96, 0.156), (0.92, 0.127)):
        codec = PercentileClipped(2, 128, zero="float", keep=keep)
        error = codec.decode(codec.encode(x), torch.float32) - x
        assert float(error.square().mean() / x.square().mean()) == pytest.approx(expected, rel=0.03)


def test_zero_constant_and_huge_rows() -> None:
    x = torch.zeros(1, 1, 4, 32)
    x[0, 0, 1], x[0, 0, 2], x[0, 0, 3, 7] = -2.5, 60000.0, 1e30
    codec = PercentileClipped(2, 32, zero="float", keep=0.92)
    back = codec.decode(codec.encode(x), torch.float32)
    assert back.isfinite().all()
    torch.testing.assert_close(back[0, 0, :3], x[0, 0, :3])


def test_published_bits() -> None:
    """64 sinks and 256 recent in 16 bits, the rest 2 + 32 / 128 bits."""
    layer = OSCAR(rotation="hadamard").layer(LayerSpec(0, 1, 4, 2, 128), None)
    [codec], window = layer.key.codecs.values(), layer.key.window
    assert window is not None
    for total, quoted in ((131_072, 2.28), (32_768, 2.38), (4096, 3.32)):
        exact = 64 + window.keep(total, total)
        assert exact == 320
        bits = (16 * exact + (total - exact) * codec.bits_per_element(128)) / total
        assert bits == pytest.approx(quoted, abs=0.006)
    assert [window.keep(n, n) for n in (100, 256, 257, 263, 264)] == [100, 256, 257, 263, 256]


@pytest.mark.parametrize("rotation", ["hadamard", "identity"])
def test_ablations_need_no_calibration(rotation: Any) -> None:
    method = OSCAR(rotation=rotation)
    assert not method.needs.statistics
    assert method.layer(SPEC, None).value.codecs
    with pytest.raises(UserError, match="kvbench calibrate"):
        OSCAR().layer(SPEC, None)
