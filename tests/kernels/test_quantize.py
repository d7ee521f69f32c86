"""Kernels that quantize and dequantize, against plain torch, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kvbench.cache import Affine
from kvbench.kernels import dequantize_triton, quantize_triton
from kvbench.kernels.launch import use_triton, why_not
from kvbench.kernels.quantize import dequantize, quantize, quantize_into, rotated
from kvbench.kernels.rounding import Rounding
from kvbench.kernels.rounding_triton import quotient
from kvbench.kernels.states import PackedStates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS: Any = ("int", "float", "symmetric")
ROUNDINGS = {
    "one_group": (128, Rounding(2, 128, "channels", "int", 0.8)),
    "quarters": (128, Rounding(2, 32, "channels", "float")),
    "halves_of_4_bits": (128, Rounding(4, 64, "channels", "symmetric")),
    "parts_of_a_block": (64, Rounding(2, 8, "channels", "int", 0.9, "midpoint")),
    "one_bit": (64, Rounding(1, 64, "channels", "float")),
    "bytes": (32, Rounding(8, 16, "channels", "int")),
    "80_channels": (80, Rounding(2, 80, "channels", "int", 0.8)),
    "96_channels": (96, Rounding(4, 32, "channels", "int")),
    "256_channels": (256, Rounding(2, 128, "channels", "float")),
    "tokens": (64, Rounding(2, 32, "tokens", "float")),
    "six_tokens": (64, Rounding(4, 6, "tokens", "int", 0.8)),
    "tokens_of_80_channels": (80, Rounding(2, 16, "tokens", "symmetric")),
}


def packed(x: torch.Tensor, rounding: Rounding, rotate: bool = False) -> PackedStates:
    """By the kernel."""
    out = filled(x, rounding, x.shape[2])
    quantize_triton.quantize_into(x, rounding, out, None, None, None, rotate)
    return out


def filled(x: torch.Tensor, rounding: Rounding, tokens: int) -> PackedStates:
    """Packed states of so many tokens, full of numbers that quantization must overwrite."""
    states = quantize(x[:1, :, :1].cpu().expand(*x.shape[:2], tokens, -1), rounding)
    parts = [
        None if part is None else torch.full_like(part, 77, device=DEVICE)
        for part in (states.codes, states.scale, states.zero)
    ]
    return replace(states, codes=parts[0], scale=parts[1], zero=parts[2])


def tensors(states: PackedStates) -> list[torch.Tensor]:
    return [t.cpu() for t in (states.codes, states.scale, states.zero) if t is not None]


def assert_same(one: PackedStates, other: PackedStates) -> None:
    for left, right in zip(tensors(one), tensors(other), strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def numbers(tokens: int, channels: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Two rows of two heads, each head with a scale and an offset of its own."""
    spread = torch.rand(2, 1, 2, 1) * 10 + 0.1
    offset = (torch.rand(2, 1, 2, 1) - 0.5) * 6 * spread
    x = torch.randn(2, tokens, 2, channels) * spread + offset
    return x.to(DEVICE, dtype).transpose(1, 2)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_agree_with_plain_torch(name: str, dtype: torch.dtype) -> None:
    channels, rounding = ROUNDINGS[name]
    assert quantize_triton.fits(channels, rounding)
    x = numbers(2 * rounding.group if rounding.along == "tokens" else 37, channels, dtype)
    states = packed(x, rounding)
    assert_same(states, quantize(x.cpu(), rounding))
    values = dequantize_triton.dequantize(states, torch.float32)
    assert torch.equal(values.cpu(), quantize(x.cpu(), rounding).dequantized())
    assert torch.equal(values.cpu(), dequantize(quantize(x.cpu(), rounding), torch.float32))
    assert dequantize_triton.dequantize(states, dtype).dtype == dtype


EXTREMES = [
    [3e38, -3e38, 1e30, 0.0],
    [3e38, 3e38, 3e38, 3e38],
    [-1e5, -9e4, -7e4, -8e4],
    [1e-40, -1e-40, 3e-39, 0.0],
    [1e-8, -2e-8, 3e-8, 0.0],
    [0.0, 6e-8, 1.2e-7, 1.8e-7],
    [1000.0, 1000.001, 1000.002, 999.999],
    [1e4, 1e-4, -1e-4, 0.0],
    [0.01, 0.02, 0.01, 60000.0],
    [0.0, 0.0, 0.0, 0.0],
    [-3.7, -3.7, -3.7, -3.7],
    [0.5, 1.5, 2.5, -0.5],
    [-1.5, 4.5, 3.0, 7.0],
]


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_extreme_groups_agree_too(bits: int, zero: Any) -> None:
    x = torch.tensor(EXTREMES, device=DEVICE).repeat(1, 8)[None, None]
    for clip, mode in ((1.0, "scale"), (0.8, "scale"), (0.8, "midpoint"), (1e-6, "scale")):
        rounding = Rounding(bits, 32, "channels", zero, clip, mode)  # type: ignore[arg-type]
        assert_same(packed(x, rounding), quantize(x.cpu(), rounding))


@pytest.mark.parametrize("implementation", ["kernel", "torch"])
@pytest.mark.parametrize("name", ["quarters", "six_tokens"])
def test_rows_of_any_length_go_anywhere(name: str, implementation: str) -> None:
    channels, rounding = ROUNDINGS[name]
    unit = rounding.group if rounding.along == "tokens" else 1
    x = numbers(12 * unit, channels)
    out = filled(x, rounding, 30 * unit)
    before = [t.clone() for t in tensors(out)]
    counts, sources, destinations = [5 * unit, 12 * unit], [9 * unit + 2, 0], [3 * unit, 17 * unit]
    places = {
        name: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        for name, values in (
            ("counts", counts),
            ("sources", sources),
            ("destinations", destinations),
        )
    }
    if implementation == "kernel":
        quantize_triton.quantize_into(x, rounding, out, *places.values(), rotate=False)
    else:
        host = replace(out, codes=out.codes.cpu(), scale=out.scale.cpu(), zero=_host(out.zero))
        places = {name: place.cpu() for name, place in places.items()}
        quantize_into(x.cpu(), rounding, host, **places)
        out = host
    for row, (count, source, place) in enumerate(zip(counts, sources, destinations, strict=True)):
        order = (torch.arange(count) + source) % x.shape[2]
        expected = quantize(x.cpu()[row : row + 1, :, order], rounding)
        for old, new, part in zip(before, tensors(out), tensors(expected), strict=True):
            first = place * new.shape[2] // out.codes.shape[2]
            old[row, :, first : first + part.shape[2]] = part[0]
    for old, new in zip(before, tensors(out), strict=True):
        assert torch.equal(old, new)


def _host(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.cpu()


def test_channels_may_lie_apart() -> None:
    rounding = Rounding(4, 32, "channels", "int")
    x = torch.randn(2, 2, 64, 20, device=DEVICE).transpose(2, 3)
    assert_same(packed(x, rounding), quantize(x.cpu(), rounding))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "bits"), [(64, 2), (128, 2), (128, 4), (256, 8)])
def test_rotation_on_the_way(channels: int, bits: int, dtype: torch.dtype) -> None:
    """Sums of another order may move a number by a float32's last bit, seldom across a tie."""
    rounding = Rounding(bits, channels, "channels", "int", 0.8)
    x = numbers(16, channels, dtype)
    assert quantize_triton.rotates(x, rounding)
    got, expected = packed(x, rounding, rotate=True), quantize(x.cpu(), rounding, rotate=True)
    assert (got.codes.cpu() != expected.codes).float().mean() < 5e-3
    torch.testing.assert_close(got.scale.cpu(), expected.scale, rtol=1e-3, atol=0)
    signs = np.array(
        [[(-1.0) ** (i & j).bit_count() for j in range(channels)] for i in range(channels)]
    )
    exact = x.double().cpu().numpy() @ signs / channels**0.5
    error = (rotated(x.cpu()).double() - torch.from_numpy(exact)).abs().max()
    assert error <= 4 * float(x.abs().max()) * channels**0.5 * torch.finfo(dtype).eps


@triton.jit
def quotients(x, scale, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """One number a scale."""
    place = tl.arange(0, N)
    tl.store(out + place, quotient(tl.load(x + place), tl.load(scale + place)))


def test_quotients_are_rounded_once() -> None:
    """Half of the numbers are a float or two away from a tie of the codes."""
    source, count = np.random.default_rng(0), 1 << 16
    scale = source.integers(1, 0x7C00, count, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = (source.standard_normal(count) * 10.0 ** source.uniform(-3, 4, count)).astype(np.float32)
    half = slice(count // 2)
    ties = (source.integers(-300, 300, count // 2) + 0.5).astype(np.float32) * scale[half]
    floats_away = source.integers(-2, 3, count // 2, dtype=np.int32)
    x[half] = (ties.view(np.int32) + floats_away).view(np.float32)
    out = torch.empty(count, device=DEVICE)
    arguments = (torch.from_numpy(x).to(DEVICE), torch.from_numpy(scale).to(DEVICE), out)
    quotients[(1,)](*arguments, N=count, enable_fp_fusion=False)
    np.testing.assert_array_equal(out.cpu().numpy(), x / scale)


def test_what_fits_no_block_is_left_to_torch() -> None:
    for channels, rounding in (
        (128, Rounding(2, 1, "channels", "int")),
        (96, Rounding(2, 3, "channels", "int")),
        (24, Rounding(1, 24, "channels", "int")),
        (128, Rounding(2, 512, "tokens", "int")),
    ):
        assert not quantize_triton.fits(channels, rounding)


def test_the_cpu_takes_plain_torch() -> None:
    x = torch.zeros(1)
    assert not use_triton(x)
    assert "CUDA" in (why_not(x) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codecs_give_the_same_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    channels, how = ROUNDINGS[name]
    codec = Affine(how.bits, how.group, how.along, how.zero, how.clip, how.clip_mode)
    x = numbers(2016, channels, dtype)
    fast, plain = codec.encode(x), codec.encode(x.cpu())
    for left, right in zip(fast, plain, strict=True):
        assert left.is_cuda
        assert torch.equal(left.cpu(), right)
    decoded = codec.decode(fast, dtype)
    assert torch.equal(decoded.cpu(), codec.decode(plain, dtype))
