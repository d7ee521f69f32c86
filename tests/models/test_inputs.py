from __future__ import annotations

import dataclasses

import pytest
import torch

from kvbench.errors import UserError
from kvbench.models.inputs import batch, encode
from kvbench.models.load import LoadedModel, Processor

TEXT = "First <ImageHere>\nthen <ImageHere>\nWhich?"
HF_TEXT = TEXT.replace("<ImageHere>", "<image>")


@pytest.fixture
def images(noise):
    return [noise(80, 50, 1), noise(40, 100, 2)]


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_inputs_equal_those_of_transformers(request, restyled, images, name: str) -> None:
    plain = restyled(request.getfixturevalue(name), prompt_style="plain", image_aspect="processor")
    ours = encode(plain, TEXT, images).kwargs()
    theirs = request.getfixturevalue(f"tiny_{name}").processor(
        images=images, text=HF_TEXT, return_tensors="pt"
    )
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def test_llava_ids_by_hand(llava: LoadedModel, restyled, images) -> None:
    loaded = restyled(llava, prompt_style="plain")
    plain = loaded.tokenizer.convert_tokens_to_ids
    inputs = encode(loaded, "a<ImageHere>b<ImageHere>", images)
    expected = [1, plain("a"), *[4] * 16, plain("b"), *[4] * 16]
    assert inputs.input_ids.tolist() == [expected]
    assert inputs.is_vision.tolist() == [[token == 4 for token in expected]]
    assert inputs.attention_mask.tolist() == [[1] * 35]
    assert inputs.prompt_tokens == (35,)


def test_qwen_ids_by_hand(qwen2_vl: LoadedModel, noise) -> None:
    inputs = encode(qwen2_vl, "a<ImageHere>b", [noise(56, 84)])
    tokenizer = qwen2_vl.tokenizer
    head, tail = qwen2_vl.style.render("a<ImageHere>b").split("<|image_pad|>")
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    expected = [  # 4 x 6 patches, merged 2 x 2: 6 tokens
        *tokenizer(head)["input_ids"],
        *[pad] * 6,
        *tokenizer(tail, add_special_tokens=False)["input_ids"],
    ]
    assert inputs.input_ids.tolist() == [expected]
    assert inputs.images["mm_token_type_ids"].tolist() == [[int(t == pad) for t in expected]]
    assert inputs.images["image_grid_thw"].tolist() == [[1, 6, 4]]


def test_every_piece_is_tokenized_as_a_text_of_its_own(
    llava: LoadedModel, sentencepiece_like, images
) -> None:
    # LLaVA's own code gives the text behind an image a leading blank (5), whole prompts do not.
    entry = dataclasses.replace(llava.entry, prompt_style="plain")
    processor = Processor(sentencepiece_like, llava.image_processor)
    loaded = dataclasses.replace(llava, entry=entry, processor=processor)
    inputs = encode(loaded, "a<ImageHere>\n<ImageHere> b", images)
    assert inputs.input_ids[~inputs.is_vision].tolist() == [5, 6, 5, 8, 5, 5, 7]


def test_adjacent_images_have_nothing_between_them(llava: LoadedModel, restyled, images) -> None:
    inputs = encode(restyled(llava, prompt_style="plain"), "<ImageHere><ImageHere>", images)
    assert inputs.input_ids.tolist() == [[1] + [4] * 32]


def test_template_that_writes_the_start_token_does_not_double_it(qwen2_vl, restyled) -> None:
    loaded = restyled(qwen2_vl, prompt_style="plain")
    assert encode(loaded, "<s>a").input_ids.tolist() == encode(loaded, "a").input_ids.tolist()


def test_image_token_in_a_document_stays_text(llava: LoadedModel, restyled, noise) -> None:
    inputs = encode(restyled(llava, prompt_style="plain"), "<image><ImageHere>", [noise(9, 9)])
    assert int((inputs.input_ids == 4).sum()) == 16
    assert "< image>" in llava.tokenizer.decode(inputs.input_ids[0])


def test_prompt_without_images(llava: LoadedModel, text_only: LoadedModel) -> None:
    for loaded in (llava, text_only):
        inputs = encode(loaded, "hello")
        assert set(inputs.kwargs()) == {"input_ids", "attention_mask"}
        assert not inputs.is_vision.any()


@pytest.mark.parametrize(("text", "count"), [("no marker", 1), ("<ImageHere>", 0), (TEXT, 1)])
def test_markers_and_images_must_agree(llava: LoadedModel, noise, text: str, count: int) -> None:
    found = text.count("<ImageHere>")
    with pytest.raises(
        UserError, match=f"sample 7 of DocVQA has {found} image markers but {count}"
    ):
        encode(llava, text, [noise(9, 9)] * count, where="sample 7 of DocVQA")


def test_prompt_longer_than_the_model(text_only: LoadedModel) -> None:
    # 4096 positions, 256 of slack, one start token, one token a letter.
    assert encode(text_only, "a" * 4351).prompt_tokens == (4352,)
    with pytest.raises(UserError, match="sample 7 has 4353 tokens, but mine reads 4096"):
        encode(text_only, "a" * 4352, where="sample 7")


def test_pixels_take_the_models_dtype(tiny_llava_folder, noise) -> None:
    from kvbench.models.find import find_model
    from kvbench.models.load import load_model

    loaded = load_model(find_model(f"mine={tiny_llava_folder}"), dtype="bfloat16")
    inputs = encode(loaded, "<ImageHere>", [noise(9, 9)])
    assert inputs.images["pixel_values"].dtype == torch.bfloat16
    assert inputs.input_ids.dtype == torch.int64


CASES = [
    ("llava", "pad"),
    ("llava_next", "pad"),
    ("llava_next", "processor"),
    ("qwen2_vl", "bounded"),
]


@pytest.mark.parametrize(("name", "aspect"), CASES)
def test_padded_rows_are_answered_like_the_same_rows_alone(
    request, restyled, noise, name: str, aspect: str
) -> None:
    loaded = restyled(request.getfixturevalue(name), image_aspect=aspect)
    rows = [
        encode(loaded, TEXT, [noise(80, 50, 1), noise(40, 100, 2)]),
        encode(loaded, "Short <ImageHere>", [noise(60, 60, 3)]),
        encode(loaded, "None at all"),
    ]
    together = batch(rows, loaded.pad_id)
    width = together.input_ids.shape[1]
    assert together.prompt_tokens == tuple(row.input_ids.shape[1] for row in rows)
    assert together.attention_mask.sum(1).tolist() == list(together.prompt_tokens)
    assert together.is_vision.sum(1).tolist() == [int(row.is_vision.sum()) for row in rows]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    answers = loaded.model.generate(**together.kwargs(), **options)[:, width:]
    for row, answer in zip(rows, answers, strict=True):
        alone = loaded.model.generate(**row.kwargs(), **options)
        assert alone[0, row.input_ids.shape[1] :].tolist() == answer.tolist()
