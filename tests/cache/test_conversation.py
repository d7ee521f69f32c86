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
METHODS = (
    "fp16",
    "rtn_int4",
    "akvq_vl[recent=8,pivots=2]",
    "kivi[residual=16,group_size=8]",
    "skvq[reorder=false,window=8]",
)

ATTENTIVE = (
    "mikv[ratio=0.3]",
    "mikv[ratio=0.3,high_bits=8]",
    "zipcache[stream=6]",
    "zipvl[stream=6,drop=true,tau=0.8]",
    "kvcrush[start=2,recent=4,keep=0.4]+skvq[reorder=false,window=8]",
)
"""Methods that ask for queries, too."""


def second_turn(first: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The answer and a new question behind the first prompt."""
    question = torch.tensor([[40, 50, 60, 70, 80], [90, 100, 110, 120, 130]])
    ids = torch.cat((first.sequences, question), 1)
    mask = torch.ones_like(ids)
    mask[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def two_turns(greedy: Any, given: Any, cache: Any) -> Any:
    """The second answer of a conversation."""
    first = greedy(given.model, given.inputs, cache, 6)
    return greedy(given.model, second_turn(first, given.inputs), cache, 6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_goes_on_like_the_dynamic_cache(
    case, greedy, distance, family: str, protocol: str
) -> None:
    given = case(family)
    cache = quantized_cache(given.model, "fp16", protocol=protocol)
    answers = [
        two_turns(greedy, given, each) for each in (cache, DynamicCache(config=given.model.config))
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert distance(*answers) < 1e-9


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", (*METHODS, *ATTENTIVE))
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_storage_goes_on_in_any_basis(
    case, exactly, greedy, distance, family: str, method: str, protocol: str
) -> None:
    given = case(family)
    cache = quantized_cache(given.model, exactly(method), protocol=protocol)
    answers = [
        two_turns(greedy, given, each) for each in (cache, DynamicCache(config=given.model.config))
    ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert distance(*answers) < 1e-9


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", (*METHODS, *ATTENTIVE))
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
        out = model(
            more, attention_mask=longer, position_ids=after, past_key_values=together
        ).logits
        for row in (0, 1):
            alone = quantized_cache(model, method, protocol=protocol)
            model(**given.row(row), past_key_values=alone)
            single = model(more[row : row + 1], past_key_values=alone).logits
            torch.testing.assert_close(out[row], single[0], atol=1e-9, rtol=1e-9)


def in_chunks(model: Any, ids: torch.Tensor, sizes: list[int], cache: Any) -> torch.Tensor:
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_chunks_equals_the_dynamic_cache(
    case, exactly, family: str, protocol: str
) -> None:
    model = case(family).model
    if family == "qwen2_vl_text":
        model.model.rope_deltas = None  # else of the last prompt, which had other rows
    ids = torch.arange(20, 60)[None]
    for method in ("fp16", exactly("skvq[reorder=false,window=8]")):
        cache = quantized_cache(model, method, protocol=protocol)
        mine = in_chunks(model, ids, [7, 1, 20, 12], cache)
        expected = in_chunks(model, ids, [7, 1, 20, 12], DynamicCache(config=model.config))
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS[1:])
def test_codes_do_not_depend_on_how_a_prompt_is_cut(case, method: str) -> None:
    """Layer 0 sees the same keys and values, whatever attention made of the chunk before."""
    model = case("llama").model
    ids = torch.arange(20, 70)[None]
    stored = []
    for sizes in ([50], [20, 30], [16, *[1] * 34]):
        cache = quantized_cache(model, method, text_salient_layers=(0,))
        in_chunks(model, ids, sizes, cache)
        layer = cache.layers[0]
        stored.append(
            [
                part.data
                for store in (layer.key_store, layer.value_store)
                for segment in store.segments.values()
                for part in segment.parts
            ]
        )
    for other in stored[1:]:
        assert all(torch.equal(a, b) for a, b in zip(stored[0], other, strict=True))


def test_prompts_given_as_embeddings_need_a_vision_mask(case, greedy) -> None:
    given = case("llava")
    ids = given.row(0)["input_ids"]
    embeds = given.model.get_input_embeddings()(ids).detach()
    cache = quantized_cache(given.model, "akvq_vl")
    with pytest.raises(UserError, match="vision_mask"):
        greedy(given.model, {"inputs_embeds": embeds}, cache)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_vision_mask_does_what_placeholder_ids_do(case, greedy, distance, beams: int) -> None:
    given = case("llava")
    ids = given.inputs["input_ids"]
    vision = ids == given.model.config.image_token_id
    plain = {
        "input_ids": ids.masked_fill(vision, 7),
        "attention_mask": given.inputs["attention_mask"],
    }
    embeds = given.model.get_input_embeddings()(plain["input_ids"]).detach()
    method = "akvq_vl[recent=4,text_layers=all,pivots=0]"
    answers = []
    for inputs in (plain, {"inputs_embeds": embeds, "attention_mask": plain["attention_mask"]}):
        cache = quantized_cache(given.model, method, vision_mask=vision)
        answers.append(greedy(given.model, inputs, cache, 6, num_beams=beams))
    assert distance(*answers) < 1e-9
    unmasked = quantized_cache(given.model, method)
    text_only = greedy(given.model, plain, unmasked, 6, num_beams=beams)
    assert not torch.equal(text_only.logits[0], answers[0].logits[0])
    packed = {bits: sum(s.lengths) for bits, s in unmasked.layers[0].key_store.segments.items()}
    assert packed[2] == 0 < packed[4]


def test_a_vision_mask_of_other_rows_is_refused(case, greedy) -> None:
    given = case("llava")
    mask = torch.zeros(3, given.inputs["input_ids"].shape[1], dtype=torch.bool)
    cache = quantized_cache(given.model, "akvq_vl", vision_mask=mask)
    with pytest.raises(UserError, match="3 rows"):
        greedy(given.model, given.inputs, cache)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", (*METHODS, *ATTENTIVE))
def test_a_cache_can_be_reset(case, greedy, distance, method: str, protocol: str) -> None:
    given = case("llama")
    cache = quantized_cache(given.model, method, protocol=protocol)
    first = greedy(given.model, given.inputs, cache)
    size, read = cache.nbytes(), cache.packed_tokens_read
    cache.reset()
    assert (cache.nbytes(), cache.packed_tokens_read, cache.get_seq_length()) == (0, 0, 0)
    assert distance(first, greedy(given.model, given.inputs, cache)) == 0.0
    assert (cache.nbytes(), cache.packed_tokens_read) == (size, read)


def test_rows_can_be_chosen_and_repeated(case) -> None:
    """As contrastive and assisted strategies do; pre-RoPE keys take their positions along."""
    given = case("llama")
    model, ids = given.model, given.inputs["input_ids"]
    mask = given.inputs["attention_mask"]
    places = mask.cumsum(1).sub(1).clamp_min(0)
    next_ids, rows = torch.tensor([[30], [40], [50]]), torch.tensor([1, 1, 0])
    for method in ("rtn_int4", "skvq[reorder=false,window=8]", "kivi[residual=16,group_size=8]"):
        caches = [quantized_cache(model, method) for _ in range(3)]
        with torch.no_grad():
            for cache in caches[:2]:
                model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
            model(
                ids[rows],
                attention_mask=mask[rows],
                position_ids=places[rows],
                past_key_values=caches[2],
            )
            caches[0].batch_select_indices(rows)
            caches[1].batch_repeat_interleave(2)
            caches[1].batch_select_indices(torch.tensor([2, 3, 0]))
            longer = torch.cat((mask[rows], torch.ones_like(next_ids)), 1)
            answers = [
                model(
                    next_ids,
                    attention_mask=longer,
                    position_ids=places[rows][:, -1:] + 1,
                    past_key_values=cache,
                ).logits
                for cache in caches
            ]
        torch.testing.assert_close(answers[0], answers[2], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(answers[1], answers[2], atol=1e-9, rtol=1e-9)


def test_what_would_take_codes_apart_is_refused(case, greedy) -> None:
    given = case("llama")
    cache = quantized_cache(given.model, "rtn_int4")
    greedy(given.model, given.inputs, cache, 3)
    with pytest.raises(UserError, match="cropped"):
        cache.crop(-1)
    with pytest.raises(UserError, match="offloaded"):
        cache.offload(0)
    # Later versions of transformers ask `is_croppable` first and refuse in their own words.
    with pytest.raises((UserError, ValueError), match="cropped"):
        greedy(
            given.model,
            given.row(0),
            quantized_cache(given.model, "rtn_int4"),
            8,
            prompt_lookup_num_tokens=2,
        )
