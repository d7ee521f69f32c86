"""RoPE undone and done again, held against the models' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from kvbench.cache.rotary import RotaryPositions
from kvbench.errors import UserError

KINDS: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default", rope_theta=10000.0),
    "linear": dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
    "yarn": dict(
        rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64
    ),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=10000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
}


def embedding(kind: str) -> Any:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            rope_parameters=KINDS[kind],
        )
    )


def positions(module: Any, ids: torch.Tensor) -> RotaryPositions:
    rotary = RotaryPositions()
    rotary.append(module, ids)
    return rotary


@pytest.mark.parametrize("kind", KINDS)
def test_stripping_undoes_the_models_own_embedding(kind: str) -> None:
    module, ids = embedding(kind), torch.tensor([[3, 4, 90], [0, 1, 2]])
    keys = torch.randn(2, 2, 3, 16, dtype=torch.float64)
    cos, sin = module(keys.float(), ids)
    _, embedded = apply_rotary_pos_emb(keys, keys, cos.double(), sin.double())
    rotary = positions(module, ids)
    slots = torch.arange(3).expand(2, 3)
    torch.testing.assert_close(rotary.strip(embedded, slots), keys, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(rotary.embed(keys, slots), embedded, atol=1e-12, rtol=1e-12)


def test_slots_pick_each_tokens_own_position() -> None:
    """Stored order is not sequence order, and padded rows start elsewhere."""
    module, ids = embedding("default"), torch.tensor([[0, 1, 2, 3], [0, 0, 0, 1]])
    rotary, keys = positions(module, ids), torch.randn(2, 2, 3, 16)
    slots = torch.tensor([[2, 0, 3], [3, 2, 2]])
    cos, sin = module(keys, torch.tensor([[2, 0, 3], [1, 0, 0]]))
    _, expected = apply_rotary_pos_emb(keys, keys, cos, sin)
    torch.testing.assert_close(rotary.embed(keys, slots), expected)


def test_positions_of_later_calls_follow() -> None:
    module = embedding("default")
    rotary = positions(module, torch.tensor([[0, 1, 2]]))
    rotary.append(module, torch.tensor([[7], [9]]))  # one row stood for both
    assert rotary.ids.tolist() == [[[0, 1, 2, 7], [0, 1, 2, 9]]]
    rotary.select(torch.tensor([1, 1, 0]))
    assert rotary.ids[0, :, -1].tolist() == [9, 9, 7]
    assert rotary.nbytes == 3 * 4 * 4


def test_one_axis_stands_for_three() -> None:
    """Qwen2-VL gives three axes for a prompt and one when a conversation goes on."""
    module = embedding("default")
    rotary = positions(module, torch.tensor([[[0, 1]], [[5, 6]], [[7, 8]]]))
    rotary.append(module, torch.tensor([[[3]]]))
    assert rotary.ids[:, 0].tolist() == [[0, 1, 3], [5, 6, 3], [7, 8, 3]]


def test_partial_embeddings_leave_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    module, ids = embedding("default"), torch.tensor([[1, 2]])
    keys = torch.randn(1, 2, 2, 24)
    rotary, slots = positions(module, ids), torch.tensor([[0, 1]])
    out = rotary.embed(keys, slots)
    assert torch.equal(out[..., 16:], keys[..., 16:])
    assert not torch.equal(out[..., :16], keys[..., :16])
    torch.testing.assert_close(rotary.strip(out, slots), keys, atol=1e-5, rtol=1e-5)


def test_unknown_positions_are_named() -> None:
    with pytest.raises(UserError, match="positions"):
        RotaryPositions().embed(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.long))
