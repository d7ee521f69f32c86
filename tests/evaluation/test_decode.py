"""Greedy answers and teacher-forced twins, held against `generate` and against plain loops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from kvbench import quantized_cache
from kvbench.cache import Calibration, KVQuantizer, bind, calibrate_statistics, resolve
from kvbench.cache.contract import EXACT
from kvbench.evaluation import decode
from kvbench.evaluation.decode import Answer, Generation, answer
from kvbench.models.find import find_model
from kvbench.models.inputs import ModelInputs, batch, encode
from kvbench.models.load import LoadedModel, load_model
from kvbench.registry import METHODS

PROTOCOLS = ("quantized_prefill", "exact_prefill")
FAMILIES = ("llava", "llava_next", "qwen2_vl")
TEXTS = (
    "First <ImageHere> then <ImageHere> and what has changed between the two?",
    "<ImageHere> and here?",
    "Nothing to see, so what do you say about it?",
)
SMALL = {  # windows and groups that these prompts fill several times
    "fp16": "fp16",
    "rtn_int4": "rtn_int4[group_size=8]",
    "rtn_int2": "rtn_int2",
    "rtn_int2_wht": "rtn_int2_wht[group_size=8]",
    "rtn_int2_wht_tsa": "rtn_int2_wht_tsa[recent=8]",
    "smoothquant": "smoothquant[group_size=8]",
    "kivi": "kivi[residual=16,group_size=8]",
    "skvq": "skvq[window=8,sinks=2,group_size=8]",
    "akvq_vl": "akvq_vl[recent=8,pivots=2]",
    "oscar": "oscar[sinks=2,recent=8]",
}
PACKED = [
    name
    for name in METHODS.names()
    if isinstance(METHODS.get(name), KVQuantizer) and name != "fp16"
]


@pytest.fixture(scope="session")
def loaded(request: pytest.FixtureRequest) -> Callable[[str], LoadedModel]:
    """Family -> tiny model in float64, where sums in another order can't tip a code over."""

    @functools.cache
    def make(family: str) -> LoadedModel:
        folder: Path = request.getfixturevalue(f"tiny_{family}_folder")
        return load_model(find_model(f"tiny={folder}"), dtype=torch.float64)

    return make


@pytest.fixture(scope="session")
def calibrated() -> Callable[[LoadedModel], Calibration]:
    @functools.cache
    def make(model: Any) -> Calibration:
        return calibrate_statistics(model, [{"input_ids": torch.arange(20, 200)[None]}], {})

    return lambda given: make(given.model)


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stops(model, ids): tokens that end an answer."""

    def put(model: Any, ids: list[int] | int | None) -> None:
        monkeypatch.setattr(model.generation_config, "eos_token_id", ids)

    return put


def prompts(given: LoadedModel, texts: tuple[str, ...] = TEXTS) -> list[ModelInputs]:
    noise = np.random.default_rng(0)
    sizes = [(56, 56, 3), (70, 40, 3), (40, 60, 3)]

    def images(count: int) -> list[Image.Image]:
        pixels = [noise.integers(0, 256, size, dtype=np.uint8) for size in sizes[:count]]
        return [Image.fromarray(image) for image in pixels]

    return [encode(given, text, images(text.count("<ImageHere>"))) for text in texts]


def joined(given: LoadedModel, texts: tuple[str, ...] = TEXTS) -> ModelInputs:
    inputs = batch(prompts(given, texts), given.pad_id)
    assert (inputs.attention_mask[1:, 0] == 0).all()  # shorter rows are padded on the left
    return inputs


def generated(
    given: LoadedModel, inputs: ModelInputs, cache: Any, limits: Generation
) -> list[list[int]]:
    """Answers of transformers' own loop, cut before the token that ends them."""
    ends = given.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    out = given.model.generate(
        **inputs.kwargs(),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=limits.max_new_tokens,
        min_new_tokens=limits.min_new_tokens,
        pad_token_id=0,
    )
    rows = out[:, inputs.input_ids.shape[1] :].tolist()
    return [
        row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
        for row in rows
    ]


def log_probabilities(logits: torch.Tensor, without: list[int]) -> np.ndarray:
    kept = np.delete(logits.detach().double().numpy(), without)
    shifted = kept - kept.max()
    return shifted - np.log(np.exp(shifted).sum())


def whole(given: LoadedModel, one: ModelInputs, ids: list[int]) -> torch.Tensor:
    """Logits at the answer's positions from a single pass without any cache."""
    full = torch.cat((one.input_ids, torch.tensor([ids], dtype=torch.long)), 1)
    extra = dict(one.images)
    if "mm_token_type_ids" in extra:
        zeros = torch.zeros(1, len(ids), dtype=extra["mm_token_type_ids"].dtype)
        extra["mm_token_type_ids"] = torch.cat((extra["mm_token_type_ids"], zeros), 1)
    with torch.no_grad():
        out = given.model(
            input_ids=full, attention_mask=torch.ones_like(full), use_cache=False, **extra
        )
    return out.logits[0, one.input_ids.shape[1] - 1 :]


def forced(given: LoadedModel, one: ModelInputs, cache: Any, ids: list[int]) -> list[torch.Tensor]:
    """Logits at the answer's positions from a cache that is fed the answer token by token."""
    mask = one.attention_mask
    with torch.no_grad():
        logits = [given.model(**one.kwargs(), past_key_values=cache).logits[0, -1]]
        for token in ids:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
            extra = {}
            if "image_grid_thw" in one.images:  # M-RoPE: text goes on behind the last image's grid
                place = mask.shape[1] - 1 + given.model.model.rope_deltas
                extra["position_ids"] = place.expand(3, 1, 1)
            elif given.entry.family == "qwen2_vl":
                extra["position_ids"] = torch.full((3, 1, 1), mask.shape[1] - 1)
            out = given.model(
                input_ids=torch.tensor([[token]]),
                attention_mask=mask,
                past_key_values=cache,
                **extra,
            )
            logits.append(out.logits[0, -1])
    return logits


def by_hand(
    given: LoadedModel, one: ModelInputs, cache: Any, ids: list[int], ends: list[int], least: int
) -> list[float]:
    """KL(uncached || cache) at the answer's positions; `ends` are impossible in the first ones."""
    mine = forced(given, one, cache, ids)
    found = []
    for step, (logits, reference) in enumerate(zip(mine, whole(given, one, ids), strict=True)):
        without = ends if step < least else []
        p = log_probabilities(reference, without)
        q = log_probabilities(logits, without)
        found.append(float((np.exp(p) * (p - q)).sum()))
    return found


def early(given: LoadedModel, inputs: ModelInputs, stops: Callable[..., None]) -> list[int]:
    """Make tokens end answers that the 16-bit answers hold: at once, and later."""
    stops(given.model, None)
    free = answer(given.model, inputs, bind(given.model, "fp16").new_cache(), Generation(8, 0)).rows
    ends = sorted({free[0].ids[3], free[1].ids[0]})
    stops(given.model, ends)
    return ends


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_answers_as_generate_does(loaded, stops, family, protocol) -> None:
    given = loaded(family)
    inputs = joined(given)
    ends = early(given, inputs, stops)
    for least in (0, 1, 4):
        limits = Generation(7, least)
        cache = bind(given.model, "fp16", protocol=protocol).new_cache()
        rows = answer(given.model, inputs, cache, limits).rows
        ids = [row.ids for row in rows]
        assert ids == generated(given, inputs, DynamicCache(config=given.model.config), limits)
        assert all(least <= len(row) <= 7 for row in ids)
        assert not any(set(row) & set(ends) for row in ids)
        assert [row.usage.packed_tokens_read for row in rows] == [0, 0, 0]
        if least == 0:
            assert ids[1] == []
            assert len({len(row) for row in ids}) > 1


def test_text_alone_owes_nothing_to_the_prompt_before(loaded, stops) -> None:
    """Qwen2-VL's model remembers how far its last images shifted the positions of text."""
    given = loaded("qwen2_vl")
    stops(given.model, None)
    two_images, _, text = prompts(given)
    bound, limits = bind(given.model, "fp16"), Generation(6)
    answer(given.model, two_images, bound.new_cache(), limits)
    assert given.model.model.rope_deltas.item() < 0
    (row,) = answer(given.model, text, bound.new_cache(), limits).rows
    cache = DynamicCache(config=given.model.config)
    assert [row.ids] == generated(given, text, cache, limits)


@pytest.mark.parametrize("ends", [None, 2])
def test_one_stop_token_or_none(loaded, stops, ends) -> None:
    given = loaded("llava")
    stops(given.model, ends)
    inputs = joined(given)
    rows = answer(given.model, inputs, bind(given.model, "fp16").new_cache(), Generation(5)).rows
    cache = DynamicCache(config=given.model.config)
    assert [row.ids for row in rows] == generated(given, inputs, cache, Generation(5))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("family", "name"),
    [("llava", "rtn_int2"), ("llava", "kivi"), ("llava_next", "akvq_vl"), ("qwen2_vl", "akvq_vl")],
)
def test_quantized_answers_as_generate_does(loaded, stops, family, name, protocol) -> None:
    given, method = loaded(family), SMALL[name]
    inputs = joined(given)
    early(given, inputs, stops)
    cache = bind(given.model, method, protocol=protocol).new_cache()
    rows = answer(given.model, inputs, cache, Generation(6)).rows
    other = quantized_cache(given.model, method, protocol=protocol)
    assert [row.ids for row in rows] == generated(given, inputs, other, Generation(6))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("family", "name"),
    [("llava", "rtn_int2"), ("llava", "kivi"), ("llava", "akvq_vl"), ("qwen2_vl", "akvq_vl")],
)
def test_twins_measure_what_a_plain_loop_measures(loaded, stops, family, name, protocol) -> None:
    given, method = loaded(family), SMALL[name]
    inputs = joined(given)
    ends = early(given, inputs, stops)
    limits = Generation(6, 1)
    references = answer(given.model, inputs, bind(given.model, "fp16").new_cache(), limits).rows
    bound = bind(given.model, method, protocol=protocol)
    rows = answer(given.model, inputs, bound.new_cache(), limits, references).rows
    assert len({len(row.divergences) for row in rows}) > 1  # some answers end early
    for one, reference, row in zip(prompts(given), references, rows, strict=True):
        # All positions of the answer; the end token, where there is one, has a position too.
        ids = reference.ids if len(reference.ids) < 6 else reference.ids[:-1]
        expected = by_hand(given, one, bound.new_cache(), ids, ends, least=1)
        assert row.divergences == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert max(row.divergences) > 1e-3


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bits_do_not_diverge_from_themselves(request, stops, family, protocol) -> None:
    """The control, in float32 as models of this size run on a CPU."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    given = load_model(find_model(f"tiny={folder}"))
    inputs = joined(given)
    early(given, inputs, stops)
    bound = bind(given.model, "fp16", protocol=protocol)
    references = answer(given.model, inputs, bound.new_cache(), Generation(6)).rows
    rows = answer(given.model, inputs, bound.new_cache(), Generation(6), references).rows
    for row, reference in zip(rows, references, strict=True):
        assert row.ids == reference.ids
        assert len(row.divergences) == len(reference.log_probs) > 0
        assert max(row.divergences) <= 1e-4


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["rtn_int2", "kivi", "akvq_vl"])
def test_twins_leave_free_rows_alone(loaded, stops, name, protocol) -> None:
    given, method = loaded("llava"), SMALL[name]
    inputs = joined(given)
    early(given, inputs, stops)
    stray = [Answer([7, 9, 11, 13, 15, 17], [torch.zeros(10)] * 7) for _ in TEXTS]
    vocabulary = given.model.config.get_text_config().vocab_size
    for reference in stray:  # longer than any free answer, and nothing like it
        reference.log_probs = [torch.full((vocabulary,), -np.log(vocabulary))] * 7
    bound = bind(given.model, method, protocol=protocol)
    alone, followed = (
        answer(given.model, inputs, bound.new_cache(), Generation(4), references).rows
        for references in (None, stray)
    )
    for one, other in zip(alone, followed, strict=True):
        assert one.ids == other.ids
        assert one.usage == other.usage
        assert (len(one.divergences), len(other.divergences)) == (0, 7)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", PACKED)
def test_rows_of_a_batch_equal_the_same_rows_alone(
    loaded, calibrated, stops, name, protocol
) -> None:
    given = loaded("llava")
    whole_batch, alone = joined(given), prompts(given)
    early(given, whole_batch, stops)
    method = resolve(SMALL.get(name, name))
    bound = bind(given.model, method, protocol=protocol, calibration=calibrated(given))
    exact = bind(given.model, "fp16", protocol=protocol)
    limits = Generation(6)
    keeps_text = all(getattr(q.plan, "text", None) == EXACT for q in bound.quantizers)

    def run(inputs: ModelInputs) -> list[Answer]:
        references = answer(given.model, inputs, exact.new_cache(), limits).rows
        return answer(given.model, inputs, bound.new_cache(), limits, references).rows

    together = run(whole_batch)
    for inputs, row in zip(alone, together, strict=True):
        (one,) = run(inputs)
        assert row.ids == one.ids
        assert row.usage == one.usage
        assert row.usage is not None
        assert bool(row.usage.packed_tokens_read) == (bool(inputs.images) or not keeps_text)
        assert row.divergences == pytest.approx(one.divergences, rel=1e-3, abs=1e-6)


def test_reads_are_those_of_the_answer(loaded, stops) -> None:
    """Three layers; a prompt's own pass reads all of it, each further step one token more."""
    given = loaded("llava")
    stops(given.model, None)
    (inputs, *_) = prompts(given)
    prompt = inputs.prompt_tokens[0]
    for steps in (1, 2, 4):
        cache = bind(given.model, "rtn_int2").new_cache()
        (row,) = answer(given.model, inputs, cache, Generation(steps)).rows
        expected = 3 * sum(prompt + step for step in range(steps))
        assert row.usage is not None and row.usage.packed_tokens_read == expected


def test_long_answers_are_compared_at_their_beginning(loaded, stops, monkeypatch) -> None:
    given = loaded("llava")
    stops(given.model, None)
    inputs = joined(given)
    limits, bound = Generation(6), bind(given.model, "rtn_int2")

    def run() -> list[Answer]:
        references = answer(given.model, inputs, bind(given.model, "fp16").new_cache(), limits).rows
        return answer(given.model, inputs, bound.new_cache(), limits, references).rows

    full = run()
    monkeypatch.setattr(decode, "REFERENCE_TOKENS", 3)
    for short, long in zip(run(), full, strict=True):
        assert len(long.divergences) == 6
        assert short.divergences == pytest.approx(long.divergences[:3], rel=1e-6)


def test_impossible_tokens_count_as_nothing() -> None:
    masked = torch.tensor([0.5, 0.5, 0.0]).log()
    other = torch.tensor([0.25, 0.75, 0.0]).log()
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert decode._divergence(masked, other) == pytest.approx(expected, rel=1e-6)


def test_inputs_stay_as_they_are(loaded) -> None:
    """Methods share one batch's inputs, so nothing may write into them."""
    given = loaded("qwen2_vl")
    inputs = joined(given)
    before = replace(inputs, images={k: v.clone() for k, v in inputs.images.items()})
    ids, mask = inputs.input_ids.clone(), inputs.attention_mask.clone()
    answer(given.model, inputs, bind(given.model, SMALL["akvq_vl"]).new_cache(), Generation(3))
    assert torch.equal(inputs.input_ids, ids) and torch.equal(inputs.attention_mask, mask)
    assert all(torch.equal(v, before.images[k]) for k, v in inputs.images.items())
