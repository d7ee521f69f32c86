"""Products with Hadamard matrices of ±1, on CUDA without ever storing them in float32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvbench.kernels.launch import use_triton, where_it_is

SIZES = range(16, 513)
"""Sizes of the last dimension that a kernel takes."""


def hadamard(x: Tensor, scale: float, signs: Tensor | None = None) -> Tensor:
    """(..., D) times a matrix of ±1 times `scale`, summed in float32, in the dtype of x.

    `signs` is that (D, D) matrix, Sylvester's if None (D is then a power of two).
    """
    if use_triton(x) and x.shape[-1] in SIZES and x.dtype != torch.float64:
        from kvbench.kernels.hadamard_triton import hadamard as kernel

        with where_it_is(x):
            return kernel(x, scale, signs)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if signs is None:
        signs = sylvester(x.shape[-1], x.device)
    return ((wide @ signs.to(wide)) * scale).to(x.dtype)


@lru_cache(maxsize=16)
def sylvester(order: int, device: torch.device) -> Tensor:
    """Sylvester's (order, order) float32 matrix; the order is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
