"""Triton kernel that puts tokens into one side of a cache, each where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.rounding import Rounding
from kvbench.kernels.rounding_triton import quantize_rows
from kvbench.kernels.states import States

_NUMBERS = 1024  # of a program
_ON_DEVICE = ("slot", "bits", "places")  # rows of larger tensors: alignment differs by layer


@triton.jit(do_not_specialize_on_alignment=_ON_DEVICE)
def append_kernel(
    states: tl.tensor,
    ring: tl.tensor,
    slot: tl.tensor,
    bits: tl.tensor,
    places: tl.tensor,
    stores: tl.tuple,
    tokens: int,
    H: tl.constexpr,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    RING: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    CLIPS: tl.constexpr,
    MIDPOINTS: tl.constexpr,
) -> None:
    """A program takes HEADS heads of one token; CHANNELS is D filled up to a power of two.

    slot, bits and places have a number a token, row after row, of `tokens` each: more than one only
    without a ring. Tensors of states are tuples (pointer, strides of rows, heads and tokens). A
    store is a tuple of such tensors: one for exact states; codes, scale and zero, if there is one,
    for packed ones. The last four constants are tuples with a place for every store.
    """
    number = tl.program_id(0)
    row = (number // tokens).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    mask = (head < H) & (tl.arange(0, CHANNELS)[None, :] < D)
    wanted = tl.load(bits + number)
    place = tl.load(places + number)
    new = tl.load(_token(states, row, head, number % tokens, CHANNELS), mask, 0.0)
    leaving = new
    if RING:
        here = _token(ring, row, head, tl.load(slot + number), CHANNELS)
        leaving = tl.load(here, mask, 0.0)
        tl.debug_barrier()  # what one thread has read another may be the one to overwrite
    for i in tl.static_range(len(BITS)):
        if wanted == BITS[i]:
            if len(stores[i]) == 1:
                tl.store(_token(stores[i][0], row, head, place, CHANNELS), leaving, mask)
            else:
                packed = _quantized(
                    leaving, stores[i], HEADS, D, BITS[i], GROUPS[i], CLIPS[i], MIDPOINTS[i]
                )
                for part in tl.static_range(len(stores[i])):
                    to = _token(stores[i][part], row, head, place, packed[part].shape[1])
                    tl.store(to, packed[part], head < H)
    if RING:
        tl.store(here, new, mask)


@triton.jit
def _token(
    tensor: tl.tuple, row: tl.tensor, head: tl.tensor, place: tl.tensor, WIDTH: tl.constexpr
) -> tl.tensor:
    """Addresses of one token's numbers, (heads, WIDTH)."""
    pointer, row_stride, head_stride, token_stride = tensor
    pointer += row * row_stride + place * token_stride
    return pointer + head * head_stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _quantized(
    leaving: tl.tensor,
    store: tl.tuple,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CLIP: tl.constexpr,
    MIDPOINT: tl.constexpr,
) -> tl.tuple:
    """Codes, scale and zero of a token, with the kind of zero that the store holds."""
    last: tl.constexpr = store[len(store) - 1][0].dtype.element_ty
    kind: tl.constexpr = "int" if last == tl.int16 else "float" if len(store) == 3 else "symmetric"
    wide = leaving.to(tl.float32)
    return quantize_rows(wide, HEADS, D, BITS, GROUP, kind, CLIP, MIDPOINT)


def append(
    states: Tensor,
    ring: Tensor | None,
    slot: Tensor,
    evicted: Sequence[States],
    roundings: Sequence[Rounding | None],
    bits: Tensor,
    places: Tensor,
) -> None:
    """Append one token a row; see `kvbench.kernels.append`."""
    _launch(states[:, :, None], ring, slot, evicted, roundings, bits, places)


def scatter(
    states: Tensor,
    stores: Sequence[States],
    roundings: Sequence[Rounding | None],
    bits: Tensor,
    places: Tensor,
) -> None:
    """Store many tokens a row; see `kvbench.kernels.append`."""
    _launch(states, None, places, stores, roundings, bits.contiguous(), places.contiguous())


def _launch(
    states: Tensor,
    ring: Tensor | None,
    slot: Tensor,
    stores: Sequence[States],
    roundings: Sequence[Rounding | None],
    bits: Tensor,
    places: Tensor,
) -> None:
    """States are (B, H, n, D)."""
    rows, kv_heads, tokens, size = states.shape
    channels = triton.next_power_of_2(size)
    heads = min(triton.next_power_of_2(kv_heads), max(_NUMBERS // channels, 1))
    append_kernel[rows * tokens, triton.cdiv(kv_heads, heads)](
        _strided(states),
        _strided(states if ring is None else ring),
        slot,
        bits,
        places,
        tuple(map(_tensors, stores)),
        tokens,
        H=kv_heads,
        D=size,
        CHANNELS=channels,
        HEADS=heads,
        RING=ring is not None,
        **_formats(roundings),
        num_warps=min(max(heads * channels // 256, 1), 8),  # 16 bytes a thread
        enable_fp_fusion=False,
    )


def _strided(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """(B, H, N, ...) as the kernel takes it."""
    row, head, token = tensor.stride()[:3]
    return tensor, row, head, token


def _tensors(states: States) -> tuple[tuple[Tensor, int, int, int], ...]:
    """A store as the kernel takes it."""
    if isinstance(states, Tensor):
        return (_strided(states),)
    return tuple(map(_strided, states.tensors))


def _formats(roundings: Sequence[Rounding | None]) -> dict[str, tuple[Any, ...]]:
    """The stores' constants by name."""
    formats = [
        (16, 1, 1.0, False) if r is None else (r.bits, r.group, r.clip, r.clip_mode == "midpoint")
        for r in roundings
    ]
    columns = list(zip(*formats, strict=True)) or [()] * 4
    return dict(zip(("BITS", "GROUPS", "CLIPS", "MIDPOINTS"), columns, strict=True))


def compile_examples() -> list[tuple[Any, dict[str, Any], dict[str, Any], int]]:
    """Kernel, types of its arguments, constants and warps, for ahead-of-time compilation."""
    strides = ("i32",) * 3
    numbers = dict.fromkeys(_ON_DEVICE, "*i32")
    shape: dict[str, Any] = {"H": 28, "D": 128, "CHANNELS": 128, "HEADS": 8}
    shape |= {"BITS": (2, 4, 8, 16), "GROUPS": (128, 32, 64, 1)}
    shape |= {"CLIPS": (1.0, 0.9, 0.95, 1.0), "MIDPOINTS": (False, True, False, False)}
    examples: list[tuple[Any, dict[str, Any], dict[str, Any], int]] = []
    for dtype, ring in ("*fp16", True), ("*bf16", True), ("*fp32", False):
        states = (dtype, *strides)
        codes, scale, zero = ("*u8", *strides), ("*fp16", *strides), ("*i16", *strides)
        stores = (codes, scale, zero), (codes, scale, scale), (codes, scale), (states,)
        types = {"states": states, "ring": states, "stores": stores, "tokens": "i32"} | numbers
        examples.append((append_kernel, types, shape | {"RING": ring}, 4))
    return examples
