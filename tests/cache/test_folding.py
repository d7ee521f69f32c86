"""Value transforms folded into W_V and W_O: other weights, the same model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench.cache import bind, calibrate_statistics
from kvbench.cache.folding import fold_values
from kvbench.errors import UserError

IDS = torch.arange(20, 60)[None]
MODELS: dict[str, dict[str, Any]] = {
    "grouped_query": dict(),
    "multi_head_bias": dict(heads=4, kv_heads=4, bias=True),
    "qwen2_bias": dict(kind="qwen2"),
    "head_dim_80": dict(head_dim=80, bias=True),
}


@pytest.fixture(params=MODELS)
def model(request, tiny_text_model) -> Any:
    shared = tiny_text_model(**MODELS[request.param]).model
    own = type(shared)(copy.deepcopy(shared.config)).double().eval()
    own.load_state_dict(shared.state_dict())
    return own


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def logits(model: Any, cache: Any) -> torch.Tensor:
    prompt = model(IDS, past_key_values=cache).logits
    return torch.cat((prompt, model(torch.tensor([[9]]), past_key_values=cache).logits), 1)


def test_a_folded_model_with_unfolded_queries_differs_but_its_outputs_do_not(
    model, exactly
) -> None:
    """Everything exact: values are rotated by the weights, outputs are turned back by W_O."""
    expected = logits(model, DynamicCache(config=model.config))
    bound = bind(model, exactly("akvq_vl[recent=4,rotation=random]"))
    before = weights(model)
    folded = fold_values(bound)
    assert not same(before, weights(model))
    torch.testing.assert_close(logits(model, folded.new_cache()), expected, atol=1e-10, rtol=0)
    plain = logits(model, DynamicCache(config=model.config))  # V R R⁻¹ needs no cache of ours
    torch.testing.assert_close(plain, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_folding_stores_what_the_transform_stores(model, protocol: str) -> None:
    bound = bind(model, "akvq_vl[recent=4,pivots=2]", protocol=protocol)  # type: ignore[arg-type]
    online = bound.new_cache()
    expected = logits(model, online)
    offline = fold_values(bound).new_cache()
    torch.testing.assert_close(logits(model, offline), expected, atol=1e-9, rtol=0)
    for one, other in zip(online.layers, offline.layers, strict=True):
        for bits, segment in one.value_store.segments.items():
            for a, b in zip(segment.parts, other.value_store.segments[bits].parts, strict=True):
                error = 1e-9 if bits == 16 else 0
                torch.testing.assert_close(a.data, b.data, atol=error, rtol=0)
    assert offline.nbytes() == online.nbytes()


def test_channel_scales_fold_too(model) -> None:
    calibration = calibrate_statistics(model, [{"input_ids": IDS}], {})
    bound = bind(model, "smoothquant[bits=4]", calibration=calibration)
    expected, before = logits(model, bound.new_cache()), weights(model)
    folded = fold_values(bound)
    assert not same(before, weights(model))
    torch.testing.assert_close(logits(model, folded.new_cache()), expected, atol=1e-9, rtol=0)


def test_projections_of_another_kind_cannot_be_folded(model) -> None:
    attention = model.model.layers[-1].self_attn
    attention.v_proj = torch.nn.Sequential(attention.v_proj)
    with pytest.raises(UserError, match="plain linear"):
        fold_values(bind(model, "akvq_vl"))


def test_reordering_over_heads_cannot_be_folded(model) -> None:
    bound = bind(model, "skvq[reorder=false]")
    with pytest.raises(UserError, match="can't be folded"):
        fold_values(bound)
