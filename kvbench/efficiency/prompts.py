"""Made-up prompts of a workload's shape: random text, images of noise, in micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvbench.cache.observers import image_token_ids
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError

_TEXT_TOKENS = 24
"""Of a prompt's tokens, kept from its images."""


def micro_batches(
    model: PreTrainedModel, workload: Workload, rows: int, seed: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The first row, and keyword arguments of the model's forward, of at most `rows` prompts.

    Raises:
        UserError: the vision tokens aren't whole images of this model, or it takes no images.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    for start in range(0, workload.batch, rows):
        yield start, _prompts(model, workload, min(rows, workload.batch - start), generator)


def embedded(model: PreTrainedModel, prompts: Mapping[str, Tensor]) -> Tensor:
    """(b, n, hidden) embeddings of prompts with their images in place, as LLaVA's classes do it.

    transformers finds the places among all numbers of all embeddings, which takes gigabytes; to
    write to the places that a mask picks would wait for the device.

    Raises:
        RuntimeError: There are not as many features as places; on CUDA, when next waited for.
    """
    ids = prompts["input_ids"]
    embeddings: Tensor = model.get_input_embeddings()(ids)
    if "pixel_values" in prompts:
        tower: Any = model.model
        features = tower.get_image_features(pixel_values=prompts["pixel_values"]).pooler_output
        place = ids == image_token_ids(model.config)[0]
        rank = (place.flatten().cumsum(0) - 1).clamp_min(0).view_as(ids)
        states = torch.cat(list(features)).to(embeddings.dtype)
        torch._assert_async(place.sum() == len(states), "image features don't match their places")
        embeddings = torch.where(place[..., None], states[rank], embeddings)
    return embeddings


def tokens_per_image(config: Any) -> int:
    """Vision tokens of one square image; 0 for a model that takes none."""
    vision = getattr(config, "vision_config", None)
    if vision is None or not image_token_ids(config):
        return 0
    if hasattr(vision, "image_size"):
        side: int = vision.image_size // vision.patch_size
        return side * side
    return 576  # dynamic resolution: as many as LLaVA's, by choice


def whole_images(config: Any, input_tokens: int) -> int:
    """The most vision tokens of whole images that leave room for some text."""
    each = tokens_per_image(config)
    return max(input_tokens - _TEXT_TOKENS, 0) // each * each if each else 0


def _prompts(
    model: PreTrainedModel, workload: Workload, rows: int, generator: torch.Generator
) -> dict[str, Tensor]:
    config, device = model.config, model.device
    special = image_token_ids(config)
    vocabulary = config.get_text_config(decoder=True).vocab_size
    # Placeholders stand at the end of the vocabularies that have them, special tokens at its start.
    low, high = vocabulary // 10, min([*special, vocabulary])
    shape = (rows, workload.input_tokens)
    ids = torch.randint(low, max(high, low + 1), shape, device=device, generator=generator)
    if not workload.vision_tokens:
        return {"input_ids": ids}
    each = tokens_per_image(config)
    if not each or workload.vision_tokens % each:
        raise UserError(
            f"{workload.vision_tokens} vision tokens aren't whole images of {each} tokens; choose "
            "a multiple of that."
            if each
            else "this model takes no images; use 0 vision tokens."
        )
    ids[:, workload.images] = special[0]
    images = rows * workload.vision_tokens // each
    return {"input_ids": ids, **_pixels(model, images, each, ids == special[0], generator)}


def _pixels(
    model: PreTrainedModel,
    images: int,
    each: int,
    is_vision: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    vision = model.config.vision_config
    noise: Any = {"device": model.device, "dtype": model.dtype, "generator": generator}
    if hasattr(vision, "image_size"):
        size = vision.image_size
        return {"pixel_values": torch.randn(images, 3, size, size, **noise)}
    merge = vision.spatial_merge_size
    side = round(each**0.5) * merge
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(images * side * side, width, **noise),
        "image_grid_thw": torch.tensor([[1, side, side]] * images, device=model.device),
        "mm_token_type_ids": is_vision.int(),
    }
