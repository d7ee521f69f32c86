"""Packed storage holds what it counts and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvbench import quantized_cache
from kvbench.cache.ragged import Ragged
from kvbench.cache.storage import Segment

METHODS = (
    "fp16",
    "rtn_int2",
    "kivi[residual=16,group_size=8]",
    "akvq_vl[recent=8]",
    "skvq[reorder=false,window=8]",
)


def tensors(thing: Any) -> list[torch.Tensor]:
    """Every tensor that the stores of a cache hold on to."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, Ragged):
        return [thing.data]
    if isinstance(thing, Segment):
        return tensors([thing.parts, thing.slots])
    if isinstance(thing, dict):
        return tensors(list(thing.values()))
    if isinstance(thing, (list, tuple)):
        return [tensor for item in thing for tensor in tensors(item)]
    return []


def held(cache: Any) -> int:
    """Bytes of the memory behind them, views and all."""
    stores = [s for layer in cache.layers for s in (layer.key_store, layer.value_store)]
    found = tensors([vars(store) for store in stores])
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    ids = cache.observed.rotary.ids
    return sum(memory.values()) + (0 if ids is None else ids.untyped_storage().nbytes())


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
@pytest.mark.parametrize("method", METHODS)
def test_memory_held_is_what_nbytes_says(tiny_text_model, method: str, protocol: str) -> None:
    """A view into the prompt's states would keep the whole uncompressed cache alive."""
    model = tiny_text_model().model
    cache = quantized_cache(model, method, protocol=protocol)
    with torch.no_grad():
        model(torch.arange(20, 220)[None], past_key_values=cache)
        assert held(cache) <= cache.nbytes() * 1.02
        for token in range(40):
            model(torch.tensor([[30 + token]]), past_key_values=cache)
            # A window's buffer may be one token longer than the window: two layers, two sides.
            one_token = 2 * 2 * (2 * 16 * 4 + 16)
            assert cache.nbytes() <= held(cache) + one_token
            assert held(cache) <= cache.nbytes() + one_token


def test_rows_share_a_batch_but_not_their_bytes(case) -> None:
    given = case("llama")
    for method in METHODS:
        both = quantized_cache(given.model, method)
        with torch.no_grad():
            places = given.inputs["attention_mask"].cumsum(1).sub(1).clamp_min(0)
            given.model(**given.inputs, position_ids=places, past_key_values=both)
        for index, row in enumerate(both.rows()):
            alone = quantized_cache(given.model, method)
            with torch.no_grad():
                given.model(**given.row(index), past_key_values=alone)
            assert row.nbytes == alone.nbytes(), method
            assert row.elements == alone.rows()[0].elements
            assert row.packed_tokens_read == alone.packed_tokens_read


def test_segments_append_and_drop() -> None:
    from kvbench.cache import Exact

    segment = Segment(Exact(), 2)
    states = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 4)
    segment.append(Ragged(states, (3, 2)), None)
    segment.append(Ragged(states + 100, (1, 3)), None)
    assert segment.lengths == (4, 5)
    segment.drop((1, 4))
    assert segment.lengths == (3, 1)
    rows = segment.read(torch.float32)
    assert torch.equal(rows.data[0, 0, :3], torch.cat((states[0, 0, 1:], states[0, 0, :1] + 100)))
    assert torch.equal(rows.data[1, 0, :1], states[1, 0, 2:] + 100)
