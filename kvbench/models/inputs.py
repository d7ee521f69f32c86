"""Prompts to model inputs, with the same token ids as LLaVA's own code gives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kvbench.errors import UserError
from kvbench.models.images import concatenate, prepare_images
from kvbench.models.load import LoadedModel
from kvbench.models.prompts import IMAGE_HERE

# MileBench's truncation counts neither the template nor the newlines between images, so official
# runs pass the trained range by a few tokens, which rotary positions bear.
POSITION_SLACK = 256


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of B prompts, padded on the left to T tokens.

    Attributes:
        input_ids: (B, T) int64, each image placeholder repeated to the image's number of tokens.
        attention_mask: (B, T) int64, 0 on padding.
        is_vision: (B, T) bool, True on image tokens.
        prompt_tokens: Tokens of each prompt without padding.
        images: Further keyword arguments of the model: `pixel_values` and what goes with them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_vision: Tensor
    prompt_tokens: tuple[int, ...]
    images: dict[str, Tensor] = field(default_factory=dict)

    def kwargs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model's `forward` or `generate`."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.images}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ModelInputs:
        """Return a copy on `device`, floating-point images converted to `dtype`."""
        images = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.images.items()
        }
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            is_vision=self.is_vision.to(device),
            images=images,
        )


def encode(
    loaded: LoadedModel, text: str, images: Sequence[Image.Image] = (), *, where: str = "the prompt"
) -> ModelInputs:
    """Turn one prompt into inputs on the model's device, pixels in the model's dtype.

    The pieces of text around the images are tokenized each on its own, with the
    beginning-of-sequence token before the first only, as LLaVA does.

    Args:
        loaded: The model; its entry decides the prompt style and what happens to images.
        text: The user's turn with one `<ImageHere>` for each image; the style is applied here.
        images: The images in order.
        where: What to call the prompt in messages, such as "sample 7 of StateChange".

    Raises:
        UserError: Markers and images differ in number, the model takes no images, or the prompt is
            longer than the model.
    """
    markers = text.count(IMAGE_HERE)
    if markers != len(images):
        raise UserError(
            f"{where} has {markers} image markers but {len(images)} images:"
            f" each {IMAGE_HERE} needs one"
        )
    pixels = prepare_images(loaded, images, where)
    style = loaded.style
    pieces = _pieces(loaded, style.render(text).split(style.image))
    marker = image_id(loaded) if images else -1
    ids = _interleave(pieces, pixels.tokens, marker)
    _check_length(loaded, len(ids), where)
    input_ids = torch.tensor([ids])
    is_vision = input_ids == marker
    tensors = dict(pixels.tensors)
    if loaded.entry.family == "qwen2_vl":
        tensors["mm_token_type_ids"] = is_vision.int()
    inputs = ModelInputs(input_ids, torch.ones_like(input_ids), is_vision, (len(ids),), tensors)
    return inputs.to(loaded.device, loaded.model.dtype)


def batch(inputs: Sequence[ModelInputs], pad_id: int) -> ModelInputs:
    """Join prompts into one batch, padded on the left; images follow in the prompts' order."""
    width = max(one.input_ids.shape[1] for one in inputs)

    def rows(tensors: Iterable[Tensor], fill: int | bool) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (width - t.shape[1], 0), value=fill) for t in tensors])

    return ModelInputs(
        rows((one.input_ids for one in inputs), pad_id),
        rows((one.attention_mask for one in inputs), 0),
        rows((one.is_vision for one in inputs), False),
        tuple(count for one in inputs for count in one.prompt_tokens),
        _joined_images([one.images for one in inputs], rows),
    )


def image_id(loaded: LoadedModel) -> int:
    """Token id of the image placeholder."""
    return int(loaded.model.config.image_token_id)


def _joined_images(images: list[dict[str, Tensor]], rows: Any) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for one in images for name in one):
        tensors = [one[name] for one in images if name in one]
        if name == "mm_token_type_ids":
            joined[name] = rows(tensors, 0)
        else:
            joined[name] = concatenate(tensors) if name == "pixel_values" else torch.cat(tensors)
    return joined


def _pieces(loaded: LoadedModel, texts: list[str]) -> list[list[int]]:
    """Token ids of each piece of text, the beginning-of-sequence token before the first only."""
    bos = loaded.tokenizer.bos_token
    if bos and loaded.tokens.start:  # some chat templates write it themselves
        texts = [texts[0].removeprefix(bos), *texts[1:]]
    ids = [loaded.tokens.encode(piece) for piece in texts]
    return [loaded.tokens.start + ids[0], *ids[1:]]


def _interleave(pieces: list[list[int]], counts: Sequence[int], image: int) -> list[int]:
    ids = list(pieces[0])
    for count, piece in zip(counts, pieces[1:], strict=True):
        ids += [image] * count + piece
    return ids


def _check_length(loaded: LoadedModel, length: int, where: str) -> None:
    if length > loaded.max_positions + POSITION_SLACK:
        raise UserError(
            f"{where} has {length} tokens, but {loaded.entry.name} reads {loaded.max_positions}:"
            f" lower max_context_len (now {loaded.entry.max_context_len}) or give fewer images"
        )
