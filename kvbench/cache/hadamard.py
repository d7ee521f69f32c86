"""Orthogonal rotation matrices: normalised Hadamard matrices of any order we can construct."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor

from kvbench.errors import UserError

Rotation = Literal["hadamard", "block", "random"]


def _legendre(value: int, prime: int) -> int:
    """0, 1 or -1: whether `value` is a square modulo `prime` (Euler's criterion)."""
    power = pow(value % prime, (prime - 1) // 2, prime)
    return -1 if power == prime - 1 else power


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of this order by Paley's first or second construction, or None."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        core = torch.tensor([[_legendre(i - j, q) for j in range(q)] for i in range(q)])
        skew = torch.zeros(order, order, dtype=torch.long)
        skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, core
        return (skew + torch.eye(order, dtype=torch.long)).double()
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        core = torch.tensor([[_legendre(i - j, q) for j in range(q)] for i in range(q)])
        conference = torch.zeros(q + 1, q + 1, dtype=torch.long)
        conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, core
        off = torch.tensor([[1, 1], [1, -1]])
        diagonal = torch.tensor([[1, -1], [-1, -1]])
        eye = torch.eye(q + 1, dtype=torch.long)
        return (torch.kron(conference, off) + torch.kron(eye, diagonal)).double()
    return None


def _kronecker(order: int) -> Tensor | None:
    """Sylvester's matrix, or the smallest Paley matrix times the largest possible Sylvester."""
    two = order & -order
    while two >= 1:
        odd_part = order // two
        base = torch.ones(1, 1, dtype=torch.float64) if odd_part == 1 else _paley(odd_part)
        if base is not None:
            return torch.kron(base, torch.from_numpy(sylvester(two)).double())
        two //= 2
    return None


@lru_cache(maxsize=32)
def rotation(order: int, kind: Rotation = "hadamard", seed: int = 0) -> Tensor:
    """An orthogonal (order, order) float64 matrix R; states are rotated as row vectors, x R.

    "hadamard" is H/sqrt(order), Sylvester's for powers of two (AKVQ-VL eq. 7) and Paley ⊗ Sylvester
    otherwise; "block" repeats the largest power-of-two Hadamard that divides the order along the
    diagonal; "random" is a seeded uniform rotation.

    Raises:
        UserError: no Hadamard matrix of this order is known here, or no such kind of rotation.
    """
    if kind not in get_args(Rotation):
        raise UserError(f"unknown rotation {kind!r}; use one of {get_args(Rotation)}.")
    if kind == "random":
        noise = torch.randn(order, order, generator=torch.Generator().manual_seed(seed)).double()
        q, r = torch.linalg.qr(noise)
        return q * r.diagonal().sign()
    if kind == "block":
        two = order & -order
        block = torch.from_numpy(sylvester(two)).double() / two**0.5
        return torch.block_diag(*[block] * (order // two))
    matrix = _kronecker(order)
    if matrix is None:
        raise UserError(
            f"no Hadamard matrix of order {order} is built in; where the method has a field "
            'rotation, set it to "block" or "random".'
        )
    return matrix / order**0.5
