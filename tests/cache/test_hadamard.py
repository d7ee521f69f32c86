"""Rotations are orthogonal, of every head width in use, and what the paper says they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvbench.cache.hadamard import rotation
from kvbench.errors import UserError

WIDTHS = [1, 2, 4, 8, 12, 16, 20, 28, 32, 36, 40, 64, 72, 80, 96, 112, 128, 192, 256]


@pytest.mark.parametrize("kind", ["hadamard", "block", "random"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rotations_are_orthogonal(width: int, kind: str) -> None:
    matrix = rotation(width, kind).numpy()  # type: ignore[arg-type]
    assert matrix.dtype == np.float64
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_hadamard_entries_have_one_size(width: int) -> None:
    """So every output channel takes the same share of every input channel."""
    np.testing.assert_allclose(np.abs(rotation(width).numpy()), width**-0.5, rtol=1e-12)


def test_powers_of_two_follow_the_recursion() -> None:
    """AKVQ-VL eq. 7: H(2n) = [[H, H], [H, -H]] / sqrt(2)."""
    expected = np.ones((1, 1))
    for exponent in range(9):
        np.testing.assert_allclose(rotation(2**exponent).numpy(), expected, rtol=1e-12)
        expected = np.block([[expected, expected], [expected, -expected]]) / np.sqrt(2)


def test_powers_of_two_undo_themselves() -> None:
    matrix = rotation(64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(64, dtype=torch.float64))


@pytest.mark.parametrize(("width", "block"), [(80, 16), (96, 32), (112, 16), (64, 64), (12, 4)])
def test_blocks_are_the_largest_power_of_two(width: int, block: int) -> None:
    matrix = rotation(width, "block").numpy()
    one = rotation(block).numpy()
    np.testing.assert_allclose(matrix, np.kron(np.eye(width // block), one), atol=1e-12)


def test_random_rotations_are_seeded() -> None:
    first = rotation(24, "random", 3)
    rotation.cache_clear()
    assert torch.equal(first, rotation(24, "random", 3))
    assert not torch.equal(first, rotation(24, "random", 4))
    assert float((first - rotation(24, "hadamard")).abs().max()) > 0.1


@pytest.mark.parametrize("width", [3, 5, 6, 7, 10, 18, 52])
def test_widths_without_a_hadamard_matrix_say_what_to_do(width: int) -> None:
    if width == 52:  # Paley's second construction needs 25 to be prime, which it isn't
        assert width // 2 - 1 == 25
    with pytest.raises(UserError, match='rotation, set it to "block"'):
        rotation(width)
    assert rotation(width, "block").shape == (width, width)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="walsh"):
        rotation(8, "walsh")  # type: ignore[arg-type]
