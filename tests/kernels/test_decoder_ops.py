"""Rope, norm and activation against transformers and float64 formulas; kernels against torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard as sylvester
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from kvbench.kernels import decoder_ops
from kvbench.kernels import decoder_ops_triton as kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_CUDA)]
HEADS = [(4, 4, 64), (7, 1, 128), (18, 2, 32), (2, 1, 80), (3, 3, 96)]


def close(actual: Tensor, expected: Tensor, units: float = 1.5) -> None:
    """Equal up to roundings of the last place, next to the largest number, and of float32 sums."""
    error = (actual.cpu().double() - expected.cpu().double()).abs().max()
    epsilon = units * torch.finfo(actual.dtype).eps + 8 * torch.finfo(torch.float32).eps
    assert error <= epsilon * expected.abs().max()


def nearly_all_equal(actual: Tensor, expected: Tensor) -> None:
    """The same numbers but for sums that float32 brought across the middle of two neighbours."""
    close(actual, expected, 1)
    if actual.dtype != torch.float32:
        assert (actual.cpu() == expected.to(actual.dtype)).double().mean() > 0.98


def rope_inputs(
    heads: int, kv_heads: int, size: int, dtype: torch.dtype, rows: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv with a gap after each row, and cos, sin and angles (B, D / 2) of random positions."""
    torch.manual_seed(size + heads)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * size + 16)[:, :-16].to(dtype)
    angles = torch.randint(0, 4000, (rows, 1)) * 10000.0 ** -(torch.arange(0, size, 2) / size)
    full = torch.cat((angles, angles), -1)
    return qkv, full.cos().to(dtype), full.sin().to(dtype), angles


def sylvesters(x: Tensor) -> Tensor:
    size = x.shape[-1]
    return x.double() @ torch.from_numpy(sylvester(size)).double() / size**0.5


@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS)
def test_rope_turns_pairs_of_channels(heads: int, kv_heads: int, size: int) -> None:
    qkv, cos, sin, angles = rope_inputs(heads, kv_heads, size, torch.float32)
    query, key, value = decoder_ops.rope(qkv, cos, sin, heads, kv_heads, rotate=False)
    pairs = qkv.double().unflatten(1, (-1, 2, size // 2)).numpy()
    turned = pairs[:, :, 0] + 1j * pairs[:, :, 1]
    turned *= np.exp(1j * angles.double().numpy())[:, None]
    expected = torch.from_numpy(np.concatenate((turned.real, turned.imag), -1))
    close(torch.cat((query, key), 1), expected[:, : heads + kv_heads], 4)
    assert torch.equal(value.flatten(1), qkv[:, (heads + kv_heads) * size :])
    assert value.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


def test_rope_is_that_of_transformers() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    states = torch.randn(3, 8 * 64)
    positions = torch.tensor([[0], [17], [3000]])
    cos, sin = LlamaRotaryEmbedding(config)(states[:, None], positions)
    query, key, _ = decoder_ops.rope(states, cos[:, 0], sin[:, 0], 4, 2, rotate=False)
    heads = states.view(3, 8, 1, 64)
    theirs = apply_rotary_pos_emb(heads[:, :4], heads[:, 4:6], cos, sin)
    assert torch.equal(query, theirs[0][:, :, 0])
    assert torch.equal(key, theirs[1][:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), HEADS[:3])
def test_hadamard_follows_the_rounded_rope(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> None:
    qkv, cos, sin, _ = rope_inputs(heads, kv_heads, size, dtype)
    plain = decoder_ops.rope(qkv, cos, sin, heads, kv_heads, rotate=False)
    turned = decoder_ops.rope(qkv, cos, sin, heads, kv_heads, rotate=True)
    for actual, states in zip(turned[:2], plain[:2], strict=True):
        nearly_all_equal(actual, sylvesters(states))
    assert torch.equal(turned[2], plain[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotate"),
    [(*shape, False) for shape in HEADS] + [(*shape, True) for shape in HEADS[:3]],
)
def test_rope_kernel(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, rotate: bool
) -> None:
    qkv, cos, sin, _ = rope_inputs(heads, kv_heads, size, dtype)
    expected = decoder_ops.rope(qkv, cos, sin, heads, kv_heads, rotate)
    # Views whose rows are apart, or one for all rows.
    wide = torch.stack((cos, sin)).to(DEVICE)
    actual = kernels.rope(qkv.to(DEVICE), wide[0], wide[1], heads, kv_heads, rotate)
    for ours, reference in zip(actual, expected, strict=False):
        assert ours.shape == reference.shape
        nearly_all_equal(ours, reference)


def test_rope_kernel_takes_one_position_for_all_rows() -> None:
    qkv, cos, sin, _ = rope_inputs(4, 2, 64, torch.float16)
    cos, sin = cos[:1].expand(3, -1), sin[:1].expand(3, -1)
    expected = decoder_ops.rope(qkv, cos, sin, 4, 2, rotate=False)
    actual = kernels.rope(qkv.to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), 4, 2, rotate=False)
    close(actual[0], expected[0])
    close(actual[1], expected[1])


def test_what_rope_cannot_take_is_said() -> None:
    assert decoder_ops.unsupported(80, 80, rotate=False) is None
    assert decoder_ops.unsupported(128, 128, rotate=True) is None
    assert "32 of 80" in str(decoder_ops.unsupported(80, 32, rotate=False))
    assert "power of two" in str(decoder_ops.unsupported(80, 80, rotate=True))
    assert "even" in str(decoder_ops.unsupported(81, 81, rotate=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_norm_is_that_of_llama(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, 5, 96).to(dtype)
    normed, total = decoder_ops.add_rms_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm(x + residual))
    normed, total = decoder_ops.add_rms_norm(x, None, norm.weight, 1e-5)
    assert total is x
    assert torch.equal(normed, norm(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 80, 3584])
@pytest.mark.parametrize("added", [True, False])
def test_norm_kernel(dtype: torch.dtype, hidden: int, added: bool) -> None:
    torch.manual_seed(hidden)
    x, residual = torch.randn(2, 3, hidden + 8)[..., :-8].to(dtype) * 3
    weight = torch.randn(hidden).to(dtype)
    expected = decoder_ops.add_rms_norm(x, residual if added else None, weight, 1e-6)
    on_device = [t.to(DEVICE) for t in (x, residual, weight)]
    source = on_device[1] if added else None
    normed, total = kernels.add_rms_norm(on_device[0], source, on_device[2], 1e-6)
    nearly_all_equal(normed, expected[0])
    assert torch.equal(total.cpu(), expected[1])


def test_activation_is_that_of_llama() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=40)
    mlp = LlamaMLP(config).half()
    x = torch.randn(3, 32).half()
    both = torch.nn.functional.linear(x, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    assert torch.equal(mlp.down_proj(decoder_ops.silu_mul(both)), mlp(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [24, 1024, 1376])
def test_activation_kernel(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(width)
    gate_up = (torch.randn(2, 2 * width) * 8).to(dtype)
    actual = kernels.silu_mul(gate_up.to(DEVICE))
    gate, up = gate_up.double().chunk(2, -1)
    assert actual.shape == (2, width)
    close(actual, gate * gate.sigmoid() * up)
    nearly_all_equal(actual, decoder_ops.silu_mul(gate_up))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_graph_replays_all() -> None:
    def step(x: Tensor) -> list[Tensor]:
        query, key, value = decoder_ops.rope(x, cos, sin, 6, 2, rotate=True)
        flat = torch.cat((query, key, value), 1).flatten(1)
        return [*decoder_ops.add_rms_norm(flat, x, weight, 1e-5), decoder_ops.silu_mul(flat)]

    first, cos, sin, _ = (t.cuda() for t in rope_inputs(6, 2, 64, torch.float16))
    second, weight = torch.randn_like(first), torch.randn(first.shape[1]).cuda().half()
    replayed = graph_of(step, first)
    for x in (first, second):
        for ours, eager in zip(replayed(x), step(x), strict=True):
            assert torch.equal(ours, eager)


def graph_of(step: Callable[[Tensor], list[Tensor]], x: Tensor) -> Callable[[Tensor], list[Tensor]]:
    """The step, captured once with inputs like x."""
    static, graph = x.clone(), torch.cuda.CUDAGraph()
    step(static)
    with torch.cuda.graph(graph):
        results = step(static)

    def replayed(x: Tensor) -> list[Tensor]:
        static.copy_(x)
        graph.replay()
        return results

    return replayed
