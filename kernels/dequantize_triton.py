"""Triton kernel that turns packed states back into numbers."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.quantize_triton import base_of, position, power_of_two, strided
from kvbench.kernels.rounding_triton import decode
from kvbench.kernels.states import PackedStates

_NUMBERS = 8192  # of a program


@triton.jit
def dequantize_kernel(
    codes: tl.tuple,
    scale: tl.tuple,
    zero: tl.tuple,
    out: tl.tuple,
    tokens: int,
    heads: int,
    tiles: int,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    BY_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS tokens of one head; tensors as in `quantize_kernel`."""
    row, head, tile = position(heads, tiles, False)
    token = tile * ROWS + tl.arange(0, ROWS)[:, None]
    inside = token < tokens
    line = token // GROUP if BY_TOKENS else token
    BYTES: tl.constexpr = D * BITS // 8 // WIDTH
    column = tl.arange(0, WIDTH)[None, :]
    source = base_of(codes, row, head) + token.to(tl.int64) * codes[3] + column
    target = base_of(out, row, head) + token.to(tl.int64) * out[3] + column
    for i in tl.static_range(BYTES):
        packed = tl.load(source + i * WIDTH, inside, 0).to(tl.int32)
        for plane in tl.static_range(8 // BITS):
            first = (i + plane * BYTES) * WIDTH
            if BY_TOKENS:
                group = first + column
            elif GROUP % WIDTH == 0:
                group = first // GROUP
            else:
                group = (first + column) // GROUP
            step = _load_metadata(scale, row, head, line, group, inside)
            origin = step
            if ZERO != "symmetric":
                origin = _load_metadata(zero, row, head, line, group, inside)
            values = decode((packed >> (BITS * plane)) & (2**BITS - 1), step, origin, BITS, ZERO)
            tl.store(target + first, values.to(out[0].dtype.element_ty), inside)


@triton.jit
def _load_metadata(
    tensor: tl.tuple,
    row: tl.tensor,
    head: tl.tensor,
    line: tl.tensor,
    group: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    place = base_of(tensor, row, head) + line.to(tl.int64) * tensor[3] + group
    return tl.load(place, inside, 0).to(tl.float32)


def dequantize(packed: PackedStates, dtype: torch.dtype) -> Tensor:
    """Numbers; see `kvbench.kernels.quantize`."""
    rows, heads, tokens, _ = packed.codes.shape
    channels = packed.channels
    out = torch.empty(rows, heads, tokens, channels, dtype=dtype, device=packed.codes.device)
    width = power_of_two(channels * packed.bits // 8)
    block = max(_NUMBERS // triton.next_power_of_2(channels), 1)
    tiles = triton.cdiv(tokens, block)
    if not out.numel():
        return out
    dequantize_kernel[rows * heads * tiles,](
        strided(packed.codes),
        strided(packed.scale),
        strided(packed.scale if packed.zero is None else packed.zero),
        strided(out),
        tokens,
        heads,
        tiles,
        D=channels,
        BITS=packed.bits,
        GROUP=packed.group,
        ZERO=packed.zero_kind,
        BY_TOKENS=packed.along == "tokens",
        WIDTH=width,
        ROWS=block,
        enable_fp_fusion=False,
    )
    return out


def compile_examples() -> list[tuple[Any, dict[str, Any], dict[str, Any], int]]:
    """Kernel, types of its arguments, constants and warps, for ahead-of-time compilation."""
    strides = ("i32",) * 3
    types = dict.fromkeys(("tokens", "heads", "tiles"), "i32")
    examples: list[tuple[Any, dict[str, Any], dict[str, Any], int]] = []
    for dtype, kind, bits, group, by_tokens in (
        ("*fp16", "int", 2, 128, False),
        ("*bf16", "float", 4, 8, False),
        ("*fp32", "symmetric", 8, 32, True),
    ):
        zero = "*i16" if kind == "int" else "*fp16"
        pointers = {"codes": "*u8", "scale": "*fp16", "zero": zero, "out": dtype}
        tensors = {name: (pointer, *strides) for name, pointer in pointers.items()}
        shape = dict(D=128, BITS=bits, GROUP=group, ZERO=kind, BY_TOKENS=by_tokens)
        examples.append((dequantize_kernel, types | tensors, shape | dict(WIDTH=32, ROWS=64), 4))
    return examples
