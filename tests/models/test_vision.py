from __future__ import annotations

import copy

import pytest
import torch

from kvbench.models.inputs import encode
from kvbench.models.vision import shared_vision

FAMILIES = [
    ("llava", "pad"),
    ("llava_next", "pad"),
    ("llava_next", "processor"),
    ("qwen2_vl", "bounded"),
]


@pytest.fixture
def counted():
    """counted(model): a list that grows by one at each run of the vision tower."""
    handles = []

    def count(model) -> list[int]:
        calls: list[int] = []
        tower = getattr(model.model, "vision_tower", None) or model.model.visual
        handles.append(tower.register_forward_hook(lambda *_: calls.append(1)))
        return calls

    yield count
    for handle in handles:
        handle.remove()


def answer(loaded, inputs, **options) -> list[list[int]]:
    settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None) | options
    return loaded.model.generate(**inputs.kwargs(), **settings).tolist()


@pytest.mark.parametrize(("name", "aspect"), FAMILIES)
def test_tower_runs_once_a_sample(
    request, restyled, noise, counted, name: str, aspect: str
) -> None:
    loaded = restyled(request.getfixturevalue(name), image_aspect=aspect)
    samples = [encode(loaded, "A <ImageHere> B", [noise(80, 50, seed)]) for seed in (1, 2)]
    expected = [answer(loaded, sample) for sample in samples]
    calls = counted(loaded.model)
    with shared_vision(loaded.model) as memo:
        for sample, right in zip(samples, expected, strict=True):
            assert [answer(loaded, sample) for _method in range(3)] == [right] * 3
            memo.forget()
        assert len(calls) == 2
    answer(loaded, samples[0])
    assert len(calls) == 3


@pytest.mark.parametrize(("name", "aspect"), FAMILIES)
def test_forward_and_generate_share(request, restyled, noise, counted, name, aspect) -> None:
    loaded = restyled(request.getfixturevalue(name), image_aspect=aspect)
    inputs = encode(loaded, "A <ImageHere> B", [noise(80, 50)])
    with torch.no_grad():
        expected = loaded.model(**inputs.kwargs()).logits
        calls = counted(loaded.model)
        with shared_vision(loaded.model) as memo:
            answer(loaded, inputs)
            assert torch.equal(loaded.model(**inputs.kwargs()).logits, expected)
            memo.forget()
            loaded.model(**inputs.kwargs())
            answer(loaded, inputs)
    assert len(calls) == 2


def test_type_and_fields_of_the_result_stay(llava, noise) -> None:
    pixels = encode(llava, "<ImageHere>", [noise(80, 50)]).images["pixel_values"]
    plain = llava.model.get_image_features(pixels)
    with shared_vision(llava.model):
        first, again = (llava.model.get_image_features(pixels) for _ in range(2))
    for result in (first, again):
        assert type(result) is type(plain)
        assert torch.equal(
            torch.stack(list(result.pooler_output)), torch.stack(list(plain.pooler_output))
        )
        assert torch.equal(result.last_hidden_state, plain.last_hidden_state)


def test_copies_of_pixels_count_as_the_same(llava, noise, counted) -> None:
    pixels = encode(llava, "<ImageHere>", [noise(80, 50)]).images["pixel_values"]
    calls = counted(llava.model)
    with shared_vision(llava.model), torch.no_grad():
        llava.model.get_image_features(pixels)
        llava.model.get_image_features(pixels.clone())
    assert len(calls) == 1


def test_pixels_changed_in_place_are_computed_anew(llava, noise, counted) -> None:
    pixels = encode(llava, "<ImageHere>", [noise(80, 50)]).images["pixel_values"].clone()
    calls = counted(llava.model)
    with shared_vision(llava.model), torch.no_grad():
        before = llava.model.get_image_features(pixels).pooler_output[0]
        pixels.mul_(0.5)
        after = llava.model.get_image_features(pixels).pooler_output[0]
    assert len(calls) == 2 and not torch.equal(before, after)


def test_other_arguments_are_computed_anew(llava, noise, counted) -> None:
    pixels = encode(llava, "<ImageHere>", [noise(80, 50)]).images["pixel_values"]
    calls = counted(llava.model)
    with shared_vision(llava.model), torch.no_grad():
        llava.model.get_image_features(pixels, vision_feature_layer=-1)
        llava.model.get_image_features(pixels, vision_feature_layer=-2)
    assert len(calls) == 2


def test_beams_do_not_spoil_what_is_kept(llava, noise) -> None:
    inputs = encode(llava, "A <ImageHere> B <ImageHere>", [noise(80, 50), noise(30, 30, 1)])
    greedy, beams = answer(llava, inputs), answer(llava, inputs, num_beams=3)
    with shared_vision(llava.model):
        assert answer(llava, inputs, num_beams=3) == beams
        assert answer(llava, inputs) == greedy
        assert answer(llava, inputs, num_beams=3) == beams


def test_old_results_are_dropped(llava, noise, counted) -> None:
    calls = counted(llava.model)
    pixels = [
        encode(llava, "<ImageHere>", [noise(9, 9, s)]).images["pixel_values"] for s in range(9)
    ]
    with shared_vision(llava.model), torch.no_grad():
        for one in [*pixels, pixels[-1], pixels[1], pixels[0]]:
            llava.model.get_image_features(one)
    assert len(calls) == 10  # of nine results the first one was dropped, the others kept


def test_model_is_as_before_afterwards(llava, llava_next) -> None:
    for loaded in (llava, llava_next):
        before = dict(vars(loaded.model.model))
        with pytest.raises(KeyError), shared_vision(loaded.model):
            raise KeyError
        assert vars(loaded.model.model).keys() == before.keys()
        assert vars(loaded.model.model).get("get_image_features") == before.get(
            "get_image_features"
        )


def test_models_without_vision_are_left_alone(text_only) -> None:
    before = dict(vars(text_only.model))
    with shared_vision(text_only.model) as memo:
        assert vars(text_only.model) == before
        answer(text_only, encode(text_only, "hello"))
        memo.forget()


def test_single_tiles_equal_llavas_own_features(llava_next, noise) -> None:
    # LLaVA: projector(tower(image) without the class token), nothing appended.
    pixels = encode(llava_next, "<ImageHere>", [noise(80, 50)]).images["pixel_values"]
    inner = llava_next.model.model
    with torch.no_grad():
        states = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        expected = inner.multi_modal_projector(states[:, 1:])
        features = inner.get_image_features(pixels).pooler_output
    assert len(features) == 1 and features[0].shape == (16, 64)
    assert torch.equal(features[0], expected[0])


def test_any_resolution_still_equals_the_original(
    llava_next, tiny_llava_next, restyled, noise
) -> None:
    inputs = encode(restyled(llava_next, image_aspect="processor"), "<ImageHere>", [noise(80, 50)])
    with torch.no_grad():
        ours = llava_next.model(**inputs.kwargs()).logits
        theirs = tiny_llava_next.model(**inputs.kwargs()).logits
    assert torch.equal(ours, theirs)


def test_copied_model_uses_its_own_weights(llava_next, noise) -> None:
    twin = copy.deepcopy(llava_next.model)
    with torch.no_grad():
        for parameter in twin.model.multi_modal_projector.parameters():
            parameter.zero_()
        pixels = encode(llava_next, "<ImageHere>", [noise(80, 50)]).images["pixel_values"]
        assert not twin.model.get_image_features(pixels).pooler_output[0].any()
