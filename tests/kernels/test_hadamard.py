"""Products with matrices of ±1, written out in float64."""

from __future__ import annotations

import pytest
import torch

from kvbench.cache import Rotate
from kvbench.cache.hadamard import rotation
from kvbench.kernels import hadamard_triton
from kvbench.kernels.hadamard import hadamard

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SYLVESTER, OTHERS = (16, 64, 128, 256, 512), (80, 96, 112, 160)


def products(x: torch.Tensor, scale: float, signs: torch.Tensor | None) -> list[torch.Tensor]:
    """By the kernel, and by plain torch."""
    host = None if signs is None else signs.cpu()
    return [hadamard_triton.hadamard(x, scale, signs).cpu(), hadamard(x.cpu(), scale, host)]


def walsh(size: int) -> torch.Tensor:
    """-1 to the number of ones that a row and a column share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", SYLVESTER)
def test_sylvesters_matrix(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, size, device=DEVICE).to(dtype)
    expected = x.double().cpu() @ walsh(size).double() * 0.3
    limit = 2 * torch.finfo(dtype).eps * float(expected.abs().max()) + size * 1e-7
    for got in products(x, 0.3, None):
        assert got.dtype == dtype
        assert float((got.double() - expected).abs().max()) <= limit


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", OTHERS)
def test_other_sizes_take_their_matrix(size: int, dtype: torch.dtype) -> None:
    """Paley's matrices are not symmetric: a transposed one must show."""
    signs = rotation(size).sign().to(DEVICE, torch.int8)
    x = torch.randn(2, 19, size, device=DEVICE).to(dtype)
    for mine in (signs, signs.T):
        expected = x.double().cpu() @ mine.double().cpu() * size**-0.5
        limit = 2 * torch.finfo(dtype).eps * float(expected.abs().max()) + size * 1e-7
        for got in products(x, size**-0.5, mine):
            assert float((got.double() - expected).abs().max()) <= limit


def test_strided_and_empty_states() -> None:
    x = torch.randn(2, 5, 3, 64, device=DEVICE).transpose(1, 2)
    kernel, plain = products(x, 0.125, None)
    torch.testing.assert_close(kernel, plain)
    assert hadamard_triton.hadamard(x[:, :, :0], 1.0, None).shape == (2, 3, 0, 64)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [64, 80, 96, 128, 512])
@pytest.mark.parametrize("side", ["key", "value"])
def test_rotations_are_the_same_on_a_gpu(side: str, size: int, dtype: torch.dtype) -> None:
    rotate, x = Rotate(size, side), torch.randn(4, 8, 777, size).to(dtype)
    # Half-precision results differ by a rounding, wide ones by the order of their sums.
    tolerance = (4 if dtype.itemsize == 2 else 64) * torch.finfo(dtype).eps
    for turn in (rotate.store, rotate.attend):
        torch.testing.assert_close(turn(x.cuda()).cpu(), turn(x), rtol=tolerance, atol=tolerance)
