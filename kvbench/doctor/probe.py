"""A prompt for the examination, and a model's answer to it with any cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.cache import cache_argument

if TYPE_CHECKING:
    from transformers import Cache

    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel

NEW_TOKENS = 6
"""Tokens of every answer."""

_BOXES = 16
_SIDE = 64
"""Pixels of the image's side: a small one, as an image takes the same tokens whatever its size."""


@dataclass(frozen=True)
class Spoken:
    """Greedy answers of B rows.

    Attributes:
        tokens: (B, NEW_TOKENS) int64.
        logits: (NEW_TOKENS, B, V) float32, each before its token was chosen.
    """

    tokens: Tensor
    logits: Tensor


def prompts(loaded: LoadedModel) -> ModelInputs:
    """A long and a short prompt in one padded batch, with an image if the model takes any."""
    from kvbench.models.inputs import batch, encode

    rows = [encode(loaded, *_question(loaded, boxes)) for boxes in (_BOXES, _BOXES // 2)]
    return batch(rows, loaded.pad_id)


def long_prompt(loaded: LoadedModel) -> ModelInputs:
    """The long one alone: longer than the windows of exact tokens that methods keep."""
    from kvbench.models.inputs import encode

    return encode(loaded, *_question(loaded, _BOXES))


@torch.no_grad()
def speak(model: Any, inputs: ModelInputs, cache: Cache) -> Spoken:
    """Answer with a cache, as a user's own `generate` does."""
    length = inputs.input_ids.shape[1]
    out = model.generate(
        **inputs.kwargs(),
        **cache_argument(model, cache),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Spoken(out.sequences[:, length:], torch.stack(out.logits).float())


def divergence(plain: Spoken, other: Spoken) -> float:
    """Largest KL(plain || other) in nats over rows, and over steps as long as a row agrees."""
    reference, mine = plain.logits.log_softmax(-1), other.logits.log_softmax(-1)
    terms = (reference.exp() * (reference - mine)).nan_to_num()  # 0 · (inf - inf) is nothing
    agreed = (plain.tokens == other.tokens).T.cumprod(0).bool()
    compared = torch.cat((torch.ones_like(agreed[:1]), agreed[:-1]))
    return float(terms.sum(-1)[compared].max())


def _question(loaded: LoadedModel, boxes: int) -> tuple[str, list[Any]]:
    from PIL import Image

    from kvbench.models.prompts import IMAGE_HERE

    text = " ".join(
        f"Box {box} holds {7 * box % 13} red cups and {5 * box % 11} blue plates."
        for box in range(1, boxes + 1)
    )
    text += f" How many red cups are in box {boxes // 2}?"
    if loaded.image_processor is None:
        return text, []
    picture = Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB")
    return f"{IMAGE_HERE}\n{text}", [picture]
