from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from kvbench.errors import UserError
from kvbench.models.images import anyres_tokens, concatenate, pad_to_square, prepare_images
from kvbench.models.load import LoadedModel

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
FILL = (122, 116, 104)  # 255 times CLIP's mean, cut off


@pytest.mark.parametrize(("size", "box"), [((7, 4), (0, 1, 7, 5)), ((4, 7), (1, 0, 5, 7))])
def test_padding_centres_the_image_in_the_mean_colour(noise, size, box) -> None:
    image = noise(*size)
    square = pad_to_square(image, CLIP_MEAN)
    assert square.size == (7, 7)
    assert np.array_equal(np.asarray(square.crop(box)), np.asarray(image))
    rest = np.asarray(square).copy()
    left, top, right, bottom = box
    rest[top:bottom, left:right] = FILL
    assert (rest == FILL).all()


def test_square_images_stay(noise) -> None:
    image = noise(6, 6)
    assert pad_to_square(image, CLIP_MEAN) is image


def test_padded_pixels_equal_those_of_the_padded_picture(llava: LoadedModel, noise) -> None:
    image = noise(100, 40)
    by_hand = Image.new("RGB", (100, 100), FILL)
    by_hand.paste(image, (0, 30))
    expected = llava.image_processor(by_hand, return_tensors="pt")["pixel_values"]
    pixels = prepare_images(llava, [image], "x")
    assert torch.equal(pixels.tensors["pixel_values"], expected)
    assert pixels.tokens == (16,)


def test_grey_and_transparent_images_become_rgb(llava: LoadedModel, noise) -> None:
    for mode in ("L", "RGBA", "P"):
        pixels = prepare_images(llava, [noise(30, 30).convert(mode)], "x")
        assert pixels.tensors["pixel_values"].shape == (1, 3, 56, 56)


def test_llava_next_pad_is_one_tile_an_image(llava_next: LoadedModel, llava, noise) -> None:
    images = [noise(100, 40), noise(30, 90, 1)]
    pixels = prepare_images(llava_next, images, "x")
    assert set(pixels.tensors) == {"pixel_values"} and pixels.tokens == (16, 16)
    same = prepare_images(llava, images, "x").tensors["pixel_values"]
    assert (pixels.tensors["pixel_values"] - same).abs().max() < 0.05  # 8-bit rounding apart


SIZES = [(50, 80), (80, 50), (56, 56), (200, 20), (20, 200), (113, 111), (1000, 999), (56, 112)]


@pytest.mark.parametrize("size", SIZES)
def test_anyres_tokens_equal_what_the_model_makes(
    llava_next, tiny_llava_next, restyled, noise, size
):
    pixels = prepare_images(restyled(llava_next, image_aspect="processor"), [noise(*size)], "x")
    features = tiny_llava_next.model.get_image_features(**pixels.tensors).pooler_output
    assert pixels.tokens == (len(features[0]),)


def test_anyres_tokens_by_hand() -> None:
    # 112 x 112 is best for a 112 x 56 image at pinpoints of 112 x 112 only: 8 x 8 patches, of which
    # the middle 4 columns hold the image, and a line end for each of 8 rows.
    assert anyres_tokens((112, 56), [[112, 112]], tile=56, grid=4) == 8 * 4 + 8


@pytest.mark.parametrize(("size", "grid"), [((56, 56), (4, 4)), ((28, 84), (6, 2))])
def test_qwen_tokens_are_a_quarter_of_the_patches(qwen2_vl: LoadedModel, noise, size, grid) -> None:
    # At least 56 x 56 pixels: 28 x 84 is enlarged to 28 x 112 or so; patches of 14.
    pixels = prepare_images(qwen2_vl, [noise(*size)], "x")
    _, rows, columns = pixels.tensors["image_grid_thw"][0].tolist()
    assert pixels.tokens == (rows * columns // 4,)
    assert len(pixels.tensors["pixel_values"]) == rows * columns
    if size == (56, 56):
        assert (rows, columns) == grid


def test_bounded_images_have_at_most_the_counted_tokens(qwen2_vl, restyled, noise) -> None:
    images = [noise(300, 200), noise(250, 260)]
    free = prepare_images(restyled(qwen2_vl, image_aspect="processor"), images, "x")
    bounded = prepare_images(restyled(qwen2_vl, tokens_per_image=9), images, "x")
    assert min(free.tokens) > 9 >= max(bounded.tokens)


def test_text_model_takes_no_images(text_only: LoadedModel, noise) -> None:
    with pytest.raises(UserError, match="takes no images, but sample 7 has 1"):
        prepare_images(text_only, [noise(8, 8)], "sample 7")


def test_image_that_the_processor_refuses(qwen2_vl: LoadedModel, noise) -> None:
    with pytest.raises(UserError, match="an image of sample 7 can't be used"):
        prepare_images(qwen2_vl, [noise(1000, 2)], "sample 7")


def test_concatenate_fills_up_missing_tiles() -> None:
    one, two = torch.ones(1, 3, 3, 4, 4), torch.full((2, 5, 3, 4, 4), 2.0)
    joined = concatenate([one, two])
    assert joined.shape == (3, 5, 3, 4, 4)
    assert torch.equal(joined[0, :3], one[0]) and not joined[0, 3:].any()
    assert torch.equal(joined[1:], two)
