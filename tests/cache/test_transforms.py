"""Attention is the same in every basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvbench.cache import ChannelScale, LayerSpec, MergeHeads, Rotate
from kvbench.cache.contract import Transform
from kvbench.errors import UserError

WIDTHS = [8, 12, 80]
SCALE = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) + 0.2
ORDER = torch.randperm(24, generator=torch.Generator().manual_seed(2))
SPEC = LayerSpec(0, 1, 6, 2, 12)


def transforms(side: str) -> dict[str, Transform]:
    return {
        "identity": Transform(),
        "hadamard": Rotate(12, side),
        "block": Rotate(12, side, "block"),
        "random": Rotate(12, side, "random"),
        "scale": ChannelScale(SCALE),
        "merge": MergeHeads(SPEC),
        "permute": MergeHeads(SPEC, ORDER),
    }


def states(heads: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    source = torch.Generator().manual_seed(heads)
    return torch.randn(3, heads, 5, 12, generator=source, dtype=torch.float64).to(dtype)


NAMES = list(transforms("key"))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_unchanged(name: str) -> None:
    transform, query, keys = transforms("key")[name], states(6), states(2)
    expected = query @ keys.repeat_interleave(3, 1).mT
    read = transform.read(transform.store(keys)).repeat_interleave(3, 1)
    torch.testing.assert_close(transform.attend(query) @ read.mT, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_unchanged(name: str) -> None:
    transform, values = transforms("value")[name], states(2)
    weights = torch.rand(3, 6, 4, 5, dtype=torch.float64)
    expected = weights @ values.repeat_interleave(3, 1)
    read = transform.read(transform.store(values)).repeat_interleave(3, 1)
    torch.testing.assert_close(transform.attend(weights @ read), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_stored_shape_is_what_is_stored(name: str) -> None:
    transform = transforms("key")[name]
    heads, channels = transform.stored_shape(SPEC)
    assert transform.store(states(2)).shape == (3, heads, 5, channels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_models_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    transform = transforms("key")[name]
    stored = transform.store(states(2, dtype))
    assert stored.dtype == transform.read(stored).dtype == dtype
    assert transform.attend(states(6, dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["hadamard", "block", "random", "scale"])
def test_matrices_say_what_store_does(name: str) -> None:
    transform, x = transforms("value")[name], states(2)
    matrices = transform.matrices(SPEC)
    assert matrices is not None
    assert matrices.shape == (2, 12, 12)
    torch.testing.assert_close(transform.store(x), x @ matrices, atol=1e-12, rtol=1e-12)


def test_a_reordering_over_heads_has_no_matrix_of_one_head() -> None:
    assert MergeHeads(SPEC, ORDER).matrices(SPEC) is None


@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_keep_lengths(width: int) -> None:
    x = torch.randn(1, 2, 7, width, dtype=torch.float64)
    rotated = Rotate(width, "key").store(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert float((rotated - x).abs().max()) > 0.1


def test_scales_divide_on_the_way_in() -> None:
    """SKVQ's code multiplies, which makes outliers larger."""
    stored = ChannelScale(SCALE).store(states(2))
    np.testing.assert_allclose(stored.numpy(), states(2).numpy() / SCALE.numpy()[None, :, None])


def test_merged_heads_stand_side_by_side() -> None:
    flat = np.concatenate([states(2).numpy()[:, 0], states(2).numpy()[:, 1]], -1)
    np.testing.assert_array_equal(MergeHeads(SPEC).store(states(2))[:, 0].numpy(), flat)
    permuted = MergeHeads(SPEC, ORDER).store(states(2))[:, 0].numpy()
    np.testing.assert_array_equal(permuted, flat[..., ORDER.numpy()])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_must_be_positive_and_finite(bad: float) -> None:
    scale = SCALE.clone()
    scale[1, 3] = bad
    with pytest.raises(UserError, match="calibrate again"):
        ChannelScale(scale)
