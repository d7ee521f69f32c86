"""Images to pixel values, and how many tokens each becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvbench.errors import UserError
from kvbench.models.load import LoadedModel

_CLASS_TOKEN = ("clip_vision_model",)  # vision towers whose output starts with a class token


@dataclass(frozen=True)
class Pixels:
    """What a model wants to know about the images of a prompt.

    Attributes:
        tensors: Keyword arguments for the model: `pixel_values` and, by family, `image_sizes`
            (N, 2) or `image_grid_thw` (N, 3).
        tokens: Number of tokens of each image.
    """

    tensors: dict[str, Tensor]
    tokens: tuple[int, ...]


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Centre an RGB image in a square of the mean colour, as LLaVA does for aspect ratio `pad`.

    Args:
        image: The image, RGB.
        mean: The image processor's mean, three values in [0, 1].
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare_images(loaded: LoadedModel, images: Sequence[Image.Image], where: str) -> Pixels:
    """Turn images into the model's pixel values.

    Raises:
        UserError: The model takes no images, or its image processor refuses one; `where` is named.
    """
    if not images:
        return Pixels({}, ())
    if loaded.image_processor is None:
        raise UserError(f"{loaded.entry.name} takes no images, but {where} has {len(images)}")
    rgb = [image.convert("RGB") for image in images]
    try:
        return _PREPARE[loaded.entry.family](loaded, rgb)
    except ValueError as error:
        raise UserError(f"an image of {where} can't be used: {error}") from error


def _llava(loaded: LoadedModel, images: list[Image.Image]) -> Pixels:
    processor = loaded.image_processor
    if loaded.entry.image_aspect == "pad":
        images = [pad_to_square(image, processor.image_mean) for image in images]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return Pixels({"pixel_values": pixels}, (_tile_tokens(loaded, pixels),) * len(images))


def _llava_next(loaded: LoadedModel, images: list[Image.Image]) -> Pixels:
    processor = loaded.image_processor
    if loaded.entry.image_aspect == "pad":
        squares = [pad_to_square(image, processor.image_mean) for image in images]
        # The first tile of an image is the whole of it, the others are crops: ask for few of them.
        side = int(loaded.model.config.vision_config.image_size)
        batch = processor(squares, return_tensors="pt", image_grid_pinpoints=[[side, side]])
        tiles = batch["pixel_values"][:, 0]
        return Pixels({"pixel_values": tiles}, (_tile_tokens(loaded, tiles),) * len(images))
    batch = processor(images, return_tensors="pt", do_pad=True)
    tensors = {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}
    base = _tile_tokens(loaded, tensors["pixel_values"])
    side = tensors["pixel_values"].shape[-1]
    grid = side // int(loaded.model.config.vision_config.patch_size)
    pinpoints = loaded.model.config.image_grid_pinpoints
    sizes = tensors["image_sizes"].tolist()
    return Pixels(
        tensors, tuple(base + anyres_tokens((h, w), pinpoints, side, grid) for h, w in sizes)
    )


def _qwen2_vl(loaded: LoadedModel, images: list[Image.Image]) -> Pixels:
    processor = loaded.image_processor
    merge = int(processor.merge_size)
    options: dict[str, Any] = {}
    if loaded.entry.image_aspect == "bounded":
        area = (int(processor.patch_size) * merge) ** 2  # pixels of one token
        most = min(loaded.entry.tokens_per_image * area, processor.size["longest_edge"])
        least = min(processor.size["shortest_edge"], most)
        options["size"] = {"shortest_edge": least, "longest_edge": most}
    batch = processor(images, return_tensors="pt", **options)
    grid = batch["image_grid_thw"]
    tensors = {"pixel_values": batch["pixel_values"], "image_grid_thw": grid}
    return Pixels(tensors, tuple((grid.prod(dim=1) // merge**2).tolist()))


_PREPARE = {"llava": _llava, "llava_next": _llava_next, "qwen2_vl": _qwen2_vl}


def _tile_tokens(loaded: LoadedModel, pixels: Tensor) -> int:
    """Tokens of one tile (..., 3, H, W): its patches, and the class token where it is kept."""
    config = loaded.model.config
    patch = int(config.vision_config.patch_size)
    tokens = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    keeps_class = config.vision_feature_select_strategy == "full"
    return tokens + int(keeps_class and config.vision_config.model_type in _CLASS_TOKEN)


def anyres_tokens(
    size: tuple[int, int], pinpoints: Sequence[Sequence[int]], tile: int, grid: int
) -> int:
    """Tokens that LLaVA-NeXT adds to an image's base tile: crops without padding, and line ends.

    Args:
        size: Height and width of the original image, pixels.
        pinpoints: Resolutions (height, width) that the model offers.
        tile: Side of a tile, pixels.
        grid: Patches along a tile's side.
    """
    from transformers.image_processing_utils import select_best_resolution

    height, width = size
    best_height, best_width = select_best_resolution(size, [list(p) for p in pinpoints])
    rows, columns = best_height // tile * grid, best_width // tile * grid
    if width / height > columns / rows:
        used = int(round(height * (columns / width), 7))
        rows -= (rows - used) // 2 * 2
    else:
        used = int(round(width * (rows / height), 7))
        columns -= (columns - used) // 2 * 2
    return int(rows * columns + rows)


def concatenate(pixels: Sequence[Tensor]) -> Tensor:
    """Join pixel values along images; zero tiles fill up (N, tiles, 3, H, W) to the most tiles."""
    if pixels[0].dim() != 5:
        return torch.cat(list(pixels))
    most = max(p.shape[1] for p in pixels)
    other_axes = (0, 0) * 3  # width, height and channels stay
    pad = torch.nn.functional.pad
    return torch.cat([pad(p, (*other_axes, 0, most - p.shape[1])) for p in pixels])
