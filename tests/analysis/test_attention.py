"""Sums over attention in blocks are those of the whole matrix, which is written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from kvbench.analysis import attention
from kvbench.analysis.attention import summarise

Array = NDArray[np.float64]
TOKENS, NEAR = 50, 4


def softmax_weights(view: Any) -> Array:
    """(Hq, T, T), one query at a time."""
    query, keys = view.query.double().numpy(), view.keys.double().numpy()
    heads, tokens = query.shape[:2]
    weights = np.zeros((heads, tokens, tokens))
    for head in range(heads):
        for i in range(tokens):
            seen = range(i + 1) if view.mask is None else np.flatnonzero(view.mask[i].numpy())
            logits = np.array([query[head, i] @ keys[head // 2, j] for j in seen]) * view.scaling
            if view.softcap:
                logits = view.softcap * np.tanh(logits / view.softcap)
            powers = np.exp(logits - logits.max())
            weights[head, i, list(seen)] = powers / powers.sum()
    return weights


def vision_mask(tokens: int) -> torch.Tensor:
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[8:20] = mask[26:33] = True
    return mask


def by_modality(weights: Array, is_vision: Array) -> tuple[Array, Array, int]:
    """Mean weight on a far text and vision token, per head, over queries that see both."""
    tokens = len(is_vision)
    text, vision = [], []
    for i in range(tokens):
        far = [j for j in range(5, tokens) if i - j >= NEAR]
        kinds = [[j for j in far if is_vision[j] == kind] for kind in (False, True)]
        if all(kinds):
            text.append(weights[:, i, kinds[0]].mean(1))
            vision.append(weights[:, i, kinds[1]].mean(1))
    return np.mean(text, 0), np.mean(vision, 0), len(text)


def window_mask() -> torch.Tensor:
    """A sliding window of 30 tokens, as a model's own mask."""
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return (distance >= 0) & (distance < 30)


@pytest.mark.parametrize("block", [2**22, 700, 1])
@pytest.mark.parametrize("kind", ["causal", "window", "softcap"])
def test_blocks_add_up_to_the_whole_softmax(
    make_view: Any, monkeypatch: pytest.MonkeyPatch, block: int, kind: str
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    given = {"window": {"mask": window_mask()}, "softcap": {"softcap": 1.5}}.get(kind, {})
    view = make_view(TOKENS, **given)
    is_vision, bins = vision_mask(TOKENS), torch.arange(TOKENS) // 7
    found = summarise(view, is_vision, bins, near=NEAR)

    whole = softmax_weights(view)
    places = np.arange(TOKENS)
    visible = TOKENS - places
    np.testing.assert_allclose(found.received, whole.mean(0).sum(0) / visible, rtol=1e-5)
    far = whole * (places[:, None] - places >= NEAR)
    queries = np.maximum(visible - NEAR, 0)
    np.testing.assert_allclose(found.far_mass, far.mean(0).sum(0), rtol=1e-5, atol=1e-9)
    expected = far.mean(0).sum(0) / np.maximum(queries, 1)
    np.testing.assert_allclose(found.far, expected, rtol=1e-5, atol=1e-9)
    assert found.far_queries.tolist() == queries.tolist()
    text, vision, count = by_modality(whole, is_vision.numpy())
    assert found.queries == count
    np.testing.assert_allclose(found.text, text, rtol=1e-5)
    np.testing.assert_allclose(found.vision, vision, rtol=1e-5)
    for row in range(8):
        for column in range(8):
            part = whole.mean(0)[7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
            assert float(found.grid[row, column]) == pytest.approx(part.mean(), rel=1e-5, abs=1e-9)


def test_additive_masks(make_view: Any) -> None:
    mask = window_mask()
    added = torch.zeros(TOKENS, TOKENS).masked_fill(~mask, torch.finfo(torch.float32).min)
    ends = (vision_mask(TOKENS), torch.zeros(TOKENS, dtype=torch.long))
    of_bool = summarise(make_view(TOKENS, mask=mask), *ends, near=NEAR)
    of_added = summarise(make_view(TOKENS, mask=added), *ends, near=NEAR)
    torch.testing.assert_close(of_bool.received, of_added.received)


def test_text_only_prompts_compare_nothing(make_view: Any) -> None:
    none = torch.zeros(TOKENS, dtype=torch.bool)
    found = summarise(make_view(TOKENS), none, torch.zeros(TOKENS, dtype=torch.long), near=NEAR)
    assert found.queries == 0
    assert not found.text.any()


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **kwargs or {})
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_square_matrix_of_a_long_prompt(make_view: Any) -> None:
    tokens = 4000
    view = make_view(tokens)
    with Largest() as largest:
        summarise(view, vision_mask(tokens), torch.arange(tokens) // 84, near=16)
    assert 0 < largest.numbers <= attention.BLOCK < tokens * tokens
