"""Hooks come with a cache and go with it; what they see is the call under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig

from kvbench import quantized_cache
from kvbench.cache import Needs, bind, observing
from kvbench.cache.observers import Observed, attach, decoder_stack, detach, image_token_ids
from kvbench.errors import UserError


def hooks(model: nn.Module) -> int:
    """Forward pre-hooks on all modules."""
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def model(tiny_text_model) -> Any:
    return tiny_text_model(seed=7).model


def test_hooks_go_when_the_last_cache_goes(model) -> None:
    before = hooks(model)
    one = quantized_cache(model, "akvq_vl")
    attached = hooks(model)
    assert attached > before
    other = quantized_cache(model, "skvq[reorder=false]")
    assert hooks(model) == attached
    del one
    assert hooks(model) == attached
    del other
    assert hooks(model) == before


def test_hooks_go_after_a_generation_too(model) -> None:
    before = hooks(model)
    for _ in range(3):
        cache = quantized_cache(model, "akvq_vl")
        model.generate(torch.arange(20, 40)[None], past_key_values=cache, max_new_tokens=3)
    assert hooks(model) > before
    del cache
    assert hooks(model) == before


def test_observing_can_be_nested_and_ends_on_errors(model) -> None:
    before = hooks(model)
    with observing(model):
        inside = hooks(model)
        with observing(model):
            assert hooks(model) == inside
        assert hooks(model) == inside
        with pytest.raises(ZeroDivisionError), observing(model):
            raise ZeroDivisionError
        assert hooks(model) == inside > before
    assert hooks(model) == before
    detach(model)  # one too many does no harm
    assert hooks(model) == before


def test_a_bound_method_observes_only_while_its_caches_live(model) -> None:
    before = hooks(model)
    bound = bind(model, "akvq_vl")
    assert hooks(model) == before
    cache = bound.new_cache()
    assert hooks(model) > before
    del cache
    assert hooks(model) == before


def test_other_caches_are_left_alone(model) -> None:
    ids = torch.arange(20, 40)[None]
    plain = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=5, do_sample=False)
    cache = quantized_cache(model, "rtn_int2")
    during = model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, during)
    assert cache.get_seq_length() == 0
    assert cache.observed.valid is None


def test_two_caches_of_one_model_take_turns(model) -> None:
    """Positions and modality of one conversation never reach the other."""
    prompts = [torch.arange(20, 40)[None], torch.arange(50, 83)[None]]

    def answers(caches: list[Any]) -> list[torch.Tensor]:
        out = []
        with torch.no_grad():
            for cache, ids in zip(caches, prompts, strict=True):
                model(ids, past_key_values=cache)
            for token in (5, 6, 7):
                for cache in caches:
                    out.append(model(torch.tensor([[token]]), past_key_values=cache).logits)
        return out

    method = "skvq[reorder=false,window=4]"
    together = answers([quantized_cache(model, method) for _ in prompts])
    for turn, ids in enumerate(prompts):
        prompts = [ids]
        alone = answers([quantized_cache(model, method)])
        for mine, expected in zip(together[turn::2], alone, strict=True):
            assert torch.equal(mine, expected)


@dataclass
class Spy:
    """A plan that keeps what it was told of a prompt."""

    plan: Any
    index: int
    seen: dict[int, torch.Tensor]

    def prompt(self, tokens: Any) -> torch.Tensor:
        self.seen[self.index] = tokens.residual
        return self.plan.prompt(tokens)

    def generated(self, tokens: Any) -> torch.Tensor:
        assert tokens.residual is None
        return self.plan.generated(tokens)


def test_residual_is_the_input_of_each_layer_and_is_let_go(tiny_text_model) -> None:
    model = tiny_text_model(layers=3, seed=7).model
    ids = torch.arange(20, 40)[None]
    seen: dict[int, torch.Tensor] = {}
    cache = quantized_cache(model, "akvq_vl[pivot_layers=all]")
    for index, layer in enumerate(cache.layers):
        spy = Spy(layer.quantizer.plan, index, seen)
        object.__setattr__(layer.quantizer, "plan", spy)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(torch.tensor([[50]]), past_key_values=cache)
        model(torch.tensor([[60, 61, 62]]), past_key_values=cache)
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(seen[0], states[0])  # later layers ran on quantized states
    assert sorted(seen) == [0, 1, 2]
    assert cache.observed.residual == {}


def test_what_is_seen_of_a_padded_call() -> None:
    observed = Observed(Needs(modality=True), pre_rope=False)
    ids = torch.tensor([[0, 4, 4, 9], [9, 9, 4, 9]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    observed.see_inputs((4,), {"input_ids": ids, "attention_mask": mask})
    assert observed.valid.tolist() == mask.bool().tolist()
    assert observed.is_vision.tolist() == (ids == 4).tolist()
    longer = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
    observed.see_inputs((4,), {"input_ids": torch.tensor([[4], [9]]), "attention_mask": longer})
    assert observed.valid.tolist() == [[True], [True]]
    assert observed.is_vision.tolist() == [[True], [False]]


def test_vision_tokens_of_a_real_prompt(case) -> None:
    given = case("llava")
    config, ids = given.model.config, given.inputs["input_ids"]
    cache = quantized_cache(given.model, "akvq_vl")
    with torch.no_grad():
        given.model(**given.inputs, past_key_values=cache)
    assert cache.observed.is_vision.sum(1).tolist() == [48, 16]
    assert image_token_ids(config) == (int(ids[0].mode().values),)
    assert image_token_ids(LlamaConfig()) == ()


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no decoder stack"):
        decoder_stack(nn.Linear(2, 2))
    model = nn.Linear(2, 2)
    model.config = LlamaConfig()  # type: ignore[assignment]
    with pytest.raises(UserError, match="no decoder stack"):
        attach(model)
