"""Small unsigned integers packed into bytes along the last dimension, lowest bits first."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvbench.errors import UserError

WIDTHS = (1, 2, 4, 8)
_WHOLE = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""An integer with a byte for each code of a packed byte."""


def check_packable(bits: int, length: int) -> None:
    """Raise UserError unless `length` codes of `bits` bits fill whole bytes."""
    if bits not in WIDTHS:
        raise UserError(f"{bits}-bit codes can't be packed; use one of {WIDTHS} bits.")
    if length * bits % 8:
        raise UserError(
            f"{length} channels of {bits} bits don't fill whole bytes; use more bits or another "
            "group layout."
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes below 2**bits to (..., n * bits / 8) uint8."""
    if bits == 8:
        return codes
    # The codes of a byte as one integer, the first lowest; every shift closes half of the gaps.
    words, shift = codes.flatten().view(_WHOLE[bits]), 8 - bits
    for _ in range((8 // bits).bit_length() - 1):
        words, shift = words | (words >> shift), 2 * shift
    return words.to(torch.uint8).view(*codes.shape[:-1], codes.shape[-1] * bits // 8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(..., m) uint8 to (..., m * 8 / bits) uint8 codes."""
    if bits == 8:
        return packed
    codes = _codes_of_bytes(bits, packed.device).index_select(0, packed.flatten().int())
    return codes.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] * 8 // bits)


@lru_cache(maxsize=16)
def _codes_of_bytes(bits: int, device: torch.device) -> Tensor:
    """(256,) integers whose bytes are the codes of a byte: one look-up unpacks all of them."""
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(_WHOLE[bits]).flatten().to(device)
