"""A cache used for more than one call: conversations, chunks, embeddings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench import quantized_cache
from kvbench.errors import UserError

PROTOCOLS = ("quantized_prefill", "exact_prefill")
FAMILIES = ("llama", "mistral_window", "qwen2_mixed_windows", "qwen2_vl_text")
METHODS = ("fp16", "rtn_int4", "akvq_vl[recent=8,pivots=2]", "kivi[residual=16,group_size=8]",
           "skvq[reorder=false,window=8]")


def second_turn(first: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The answer and a new question behind the first prompt."""
    question = torch.tensor([[40, 50, 60, 70, 80], [90, 100, 110, 120, 130]])
    ids = torch.cat((first.sequences, question), 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_goes_on_like_the_dynamic_cache(
    case, greedy, distance, family: str, protocol: str
) -> None:
    given = case(family)
    answers = []
    for cache in (
        quantized_cache(given.model, "fp16", protocol=protocol),
        DynamicCache(config=given.model.config),
    ):
        first = greedy(given.model, given.inputs, cache, 6)
        answers.append(greedy(given.model, second_turn(first, given.inputs), cache, 6))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert distance(*answers) < 2e-5


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_storage_goes_on_in_any_basis(
    case, exactly, greedy, distance, family: str, method: str, protocol: str
) -> None:
    given = case(family)
    answers = []
    for cache in (
        quantized_cache(given.model, exactly(method), protocol=protocol),
        DynamicCache(config=given.model.config),
    ):
        first = greedy(given.model, given.inputs, cache, 6)
        answers.append(greedy(given.model, second_turn(first, given.inputs), cache, 6))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert distance(*answers) < 1e-3


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", METHODS)
def test_padded_rows_of_a_conversation_equal_the_same_rows_alone(
    case, method: str, protocol: str
) -> None:
    given = case("llama")
    model = given.model
    together = quantized_cache(model, method, protocol=protocol)
    mask = given.inputs["attention_mask"]
    more = torch.tensor([[40, 50, 60], [90, 100, 110]])
    with torch.no_grad():
        first = mask.cumsum(1).sub(1).clamp_min(0)
        model(**given.inputs, position_ids=first, past_key_values=together)
        longer = torch.cat((mask, torch.ones_like(more)), 1)
        after = first[:, -1:] + 1 + torch.arange(3)
        out = model(more, attention_mask=longer, position_ids=after, past_key_values=together).logits
        for row in (0, 1):
            alone = quantized_cache(model, method, protocol=protocol)
            model(**given.row(row), past_key_values=alone)
            single = model(more[row : row + 1], past_key_values=alone).logits
            torch.testing.assert_close(out[row], single[0], atol=1e-4, rtol=1e-4)
