"""Small unsigned integers packed into bytes along the last dimension, in planes.

n codes of b bits fill m = n · b / 8 bytes. Byte j holds the codes j, j + m, j + 2m, ...; the first
stands in the lowest bits. One mask and shift of the packed bytes so gives m neighbouring codes,
which is what both a vector unit and a tensor core want.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

WIDTHS = (1, 2, 4, 8)
_WORD, _PIECE = 8, 16
"""Bytes shifted at once, and bytes of a row copied at once."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """(..., n) uint8 codes below 2**bits to (..., n * bits / 8) uint8."""
    if bits == 8:
        return codes
    packed, *planes = codes.tensor_split(8 // bits, -1)
    for place, plane in enumerate(planes, 1):
        packed = packed.add(plane, alpha=2 ** (bits * place))
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """(..., m) uint8 to (..., m * 8 / bits) uint8 codes."""
    if bits == 8:
        return packed
    words, mask = packed.reshape(-1), 2**bits - 1
    if words.numel() % _WORD == 0 and words.storage_offset() % _WORD == 0:
        words, mask = words.view(torch.int64), mask * 0x0101010101010101
    # What a shift of a word brings into a byte from the next one is masked away.
    codes = (words >> _places(bits, words.dtype, words.device)).bitwise_and_(mask)
    wide = packed.is_cpu and packed.shape[-1] % _PIECE == 0 and packed.numel() > 0
    pieces = packed.shape[-1] // _PIECE if wide else packed.shape[-1]
    codes = codes.view(torch.complex128 if wide else torch.uint8)
    shape = (8 // bits, *packed.shape[:-1], pieces)
    return torch.cat(codes.view(shape).unbind(), -1).view(torch.uint8)


@lru_cache(maxsize=16)
def _places(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(8 / bits, 1) places of a byte's codes."""
    return torch.arange(0, 8, bits, dtype=dtype, device=device)[:, None]
