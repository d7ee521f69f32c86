"""Where kernels run: Triton on CUDA tensors, plain torch anywhere else."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """Whether Triton kernels can work on a tensor."""
    return x.is_cuda and _has_triton()


def where_it_is(x: Tensor) -> AbstractContextManager[None]:
    """Launch on a CUDA tensor's own device: Triton takes the current one, which may be another."""
    return torch.cuda.device(x.device)


def why_not(x: Tensor) -> str | None:
    """One sentence on why plain torch works on a tensor, None where Triton kernels do."""
    if not x.is_cuda:
        return f"The tensors are on {x.device.type}, and the kernels need CUDA."
    if not _has_triton():
        return "The package triton is not installed."
    return None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
