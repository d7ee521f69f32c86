"""Group quantization of states into packed ones, and back: one pass over the input on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.kernels.hadamard import hadamard
from kvbench.kernels.launch import use_triton, where_it_is
from kvbench.kernels.packing import PLANES, pack, unpack
from kvbench.kernels.rounding import Rounding
from kvbench.kernels.states import PackedStates

__all__ = ["Rounding", "dequantize", "quantize", "quantize_into"]


def quantize_into(
    x: Tensor,
    rounding: Rounding,
    out: PackedStates,
    *,
    counts: Tensor | None = None,
    sources: Tensor | None = None,
    destinations: Tensor | None = None,
    rotate: bool = False,
) -> None:
    """Quantize tokens of (B, H, n, D) states, any strides, into packed ones of the same rounding.

    Row b gives counts[b] tokens (all n if None) from token sources[b] < n on, wrapping after the
    last (0 if None); they are written from token destinations[b] of `out` on (0 if None). With
    `rotate` they are first multiplied by the normalised Sylvester matrix and rounded to the dtype
    of x. All three are (B,) int32 on the device, and where a kernel runs the host never reads
    them. Groups along tokens: counts and destinations are multiples of the group size.
    """
    if _fits(x, rounding):
        from kvbench.kernels.quantize_triton import quantize_into as kernel
        from kvbench.kernels.quantize_triton import rotates

        if rotate and not rotates(x, rounding):
            x, rotate = rotated(x), False
        with where_it_is(x):
            return kernel(x, rounding, out, counts, sources, destinations, rotate)
    if rotate:
        x = rotated(x)
    places = [None if p is None else p.tolist() for p in (counts, sources, destinations)]
    for row in range(x.shape[0]):
        count, source, place = (None if p is None else p[row] for p in places)
        _copy_row(x[row : row + 1], rounding, out, row, count, source or 0, place or 0)


def quantize(x: Tensor, rounding: Rounding, rotate: bool = False) -> PackedStates:
    """(B, H, n, D) states, packed; groups along tokens need n to be a multiple of their size."""
    if not _fits(x, rounding):
        return _quantized(rotated(x) if rotate else x, rounding)
    out = _empty(x, rounding)
    quantize_into(x, rounding, out, rotate=rotate)
    return out


def dequantize(packed: PackedStates, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) numbers, computed in float32 and rounded to `dtype`."""
    plain = packed.scale.dtype == torch.float16 and packed.bits in PLANES
    if use_triton(packed.codes) and plain and dtype.itemsize < 8:
        from kvbench.kernels.dequantize_triton import dequantize as kernel

        with where_it_is(packed.codes):
            return kernel(packed, dtype)
    rounding = Rounding(packed.bits, packed.group, packed.along, packed.zero_kind)
    codes = unpack(packed.codes, packed.bits)
    meta = [packed.scale] if packed.zero is None else [packed.scale, packed.zero]
    if packed.group == codes.shape[-1] and packed.along == "channels":
        return rounding.decode(codes, *meta).to(dtype)
    dim = _grouped_dim(packed)
    spread = (part.unsqueeze(dim + 1) for part in meta)
    values = rounding.decode(codes.unflatten(dim, (-1, packed.group)), *spread)
    return values.flatten(dim, dim + 1).to(dtype)


def rotated(x: Tensor) -> Tensor:
    """(..., D) times Sylvester's normalised matrix, in x's dtype; D is a power of two."""
    return hadamard(x, x.shape[-1] ** -0.5)


def _fits(x: Tensor, rounding: Rounding) -> bool:
    """Whether the kernel takes such states."""
    plain = not rounding.float8 and rounding.bits in PLANES
    if not use_triton(x) or not plain or x.dtype == torch.float64:
        return False
    from kvbench.kernels.quantize_triton import fits

    return fits(x.shape[3], rounding)


def _quantized(x: Tensor, rounding: Rounding) -> PackedStates:
    """`quantize` in plain torch."""
    dim = _grouped_dim(rounding)
    grouped = x.float().unflatten(dim, (-1, rounding.group))
    meta = rounding.metadata(*torch.aminmax(grouped, dim=dim + 1))
    spread = (m.float().unsqueeze(dim + 1) for m in meta)
    codes = pack(rounding.encode(grouped, *spread).flatten(dim, dim + 1), rounding.bits)
    scale, *zero = meta
    return PackedStates(
        codes, scale, zero[0] if zero else None, rounding.bits, rounding.group, rounding.along
    )


def _copy_row(
    x: Tensor,
    rounding: Rounding,
    out: PackedStates,
    row: int,
    count: int | None,
    source: int,
    place: int,
) -> None:
    count = x.shape[2] if count is None else count
    packed = _quantized(x.roll(-source, 2)[:, :, :count], rounding)
    block = rounding.group if rounding.along == "tokens" else 1
    for new, old, step in (
        (packed.codes, out.codes, 1),
        (packed.scale, out.scale, block),
        (packed.zero, out.zero, block),
    ):
        if new is not None and old is not None:
            old[row, :, place // step : (place + count) // step] = new[0]


def _empty(x: Tensor, rounding: Rounding) -> PackedStates:
    """Room for states, packed."""
    bits, group = rounding.bits, rounding.group
    *rest, tokens, channels = x.shape
    by_tokens = rounding.along == "tokens"
    meta = (tokens // group, channels) if by_tokens else (tokens, channels // group)
    kind = torch.int16 if rounding.zero == "int" else torch.float16
    return PackedStates(
        x.new_empty(*rest, tokens, channels * bits // 8, dtype=torch.uint8),
        x.new_empty(*rest, *meta, dtype=torch.float16),
        None if rounding.zero == "symmetric" else x.new_empty(*rest, *meta, dtype=kind),
        bits,
        group,
        rounding.along,
    )


def _grouped_dim(grouping: PackedStates | Rounding) -> int:
    """The dimension of (B, H, N, D) that groups divide."""
    return 2 if grouping.along == "tokens" else 3
