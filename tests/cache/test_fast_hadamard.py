"""The kernel of fast-hadamard-transform takes part only where it is right to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from kvbench.cache import Rotate, transforms

CALLS: list[float] = []


def butterfly(x: torch.Tensor, scale: float) -> torch.Tensor:
    """The fast transform written out, with the package's signature."""
    CALLS.append(scale)
    half = 1
    while half < x.shape[-1]:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return x * scale


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    CALLS.clear()
    monkeypatch.setattr(transforms, "fast_hadamard", lambda: butterfly)
    monkeypatch.setattr(transforms, "on_gpu", lambda x: True)
    yield


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_what_the_matrix_gives(
    kernel: None, monkeypatch: pytest.MonkeyPatch, side: str, dtype: torch.dtype
) -> None:
    rotate, x = Rotate(64, side), torch.randn(2, 3, 5, 64).to(dtype)
    fast = rotate.store(x), rotate.attend(x.transpose(1, 2).transpose(1, 2))
    assert CALLS == [0.125, 0.125]
    monkeypatch.setattr(transforms, "fast_hadamard", lambda: None)
    for one, other in zip(fast, (rotate.store(x), rotate.attend(x)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(("width", "kind"), [(80, "hadamard"), (64, "random"), (64, "block")])
def test_other_rotations_stay_with_the_matrix(kernel: None, width: int, kind: str) -> None:
    Rotate(width, "key", kind).store(torch.randn(1, 1, 2, width))  # type: ignore[arg-type]
    assert not CALLS


def test_a_missing_package_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", None)
    assert transforms.fast_hadamard.__wrapped__() is None


def test_the_package_gives_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(hadamard_transform=butterfly)
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", package)
    assert transforms.fast_hadamard.__wrapped__() is butterfly
