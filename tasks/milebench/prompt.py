"""MileBench's prompt: instruction, text with options, image markers, truncation from the left.

Follows the benchmark's official generation code (github.com/MileBench/MileBench) in its
multi-image mode. Pure functions; nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import UserError
from kvbench.tasks.base import IMAGE_MARKER, Prompt, Sample, Tokens

PLACEHOLDER = re.compile(r"\{(?:image|table)#([^{}]*)\}")
"""Where an image stands in an annotation's text, and its number."""


def option_list(choices: Sequence[str], lettered: bool = True) -> str:
    """The options as they follow the context, blanks at line ends included.

    Letters are consecutive code points from "A", also past "Z".
    """
    lines = [
        f"{chr(ord('A') + index)}. {choice}" if lettered else choice
        for index, choice in enumerate(choices)
    ]
    return "\nChoice list: \n" + "\n".join(lines) + "\nYour answer is: "


def full_text(context: str, choices: Sequence[str] | None, lettered: bool = True) -> str:
    """Context and, where there are any, options; placeholders are still in place."""
    return context if choices is None else context + option_list(choices, lettered)


def place_markers(text: str, images: int) -> str:
    """Turns `{image#k}` and `{table#k}`, k = 1 ... `images`, into image markers.

    The number is thrown away: markers and images are aligned by position.
    """
    known = {str(k) for k in range(1, images + 1)}
    return PLACEHOLDER.sub(lambda match: IMAGE_MARKER if match[1] in known else match[0], text)


def newline_rule(text: str) -> str:
    """Follows both markers of every adjacent pair by a newline.

    Pairs don't overlap, so the last of an odd number of adjacent markers gets none.
    """
    return text.replace(IMAGE_MARKER * 2, f"{IMAGE_MARKER}\n" * 2)


@dataclass(frozen=True)
class Kept:
    """What truncation left: text fragments in order and the images that fit."""

    fragments: tuple[str, ...]
    images: tuple[Path, ...]
    starts_with_image: bool
    truncated: bool

    def text(self) -> str:
        """The fragments with an image marker between each two."""
        return IMAGE_MARKER * self.starts_with_image + IMAGE_MARKER.join(self.fragments)


def truncate(
    text: str, images: Sequence[Path], tokenizer: Tokens, budget: int, tokens_per_image: int
) -> Kept:
    """Keeps the end of `text` and the last images that fit into `budget` tokens.

    Walks the fragments between markers from last to first. A fragment that doesn't fit ends
    the walk; only the very last one is cut rather than dropped. Images are taken from the end
    of `images` whatever their placeholders said. Kept text is decoded from its own token ids.

    Args:
        text: context and options with image markers.
        images: the sample's images in order.
        tokenizer: without special tokens.
        budget: tokens for text and images, at least 1.
        tokens_per_image: what one image costs.
    """
    fragments = text.split(IMAGE_MARKER)
    kept: list[str] = []
    used, room = 0, len(images)
    starts_with_image = cut = False
    for fragment in reversed(fragments):
        ids = tokenizer.encode(fragment)
        if len(ids) + used > budget:
            cut = True
            if not kept:
                kept.append(tokenizer.decode(ids[-budget:]))
            break
        kept.append(tokenizer.decode(ids))
        used += len(ids)
        starts_with_image = False
        if tokens_per_image + used > budget:
            cut = room > 0 or len(kept) < len(fragments)
            break
        if room:
            room -= 1
            used += tokens_per_image
            starts_with_image = True
    return Kept(tuple(reversed(kept)), tuple(images[room:]), starts_with_image, cut)


def build_prompt(
    sample: Sample,
    tokenizer: Tokens,
    max_context_len: int,
    tokens_per_image: int,
    lettered: bool = True,
) -> Prompt:
    """A sample's whole prompt: instruction, newline, truncated text.

    The chat template, special tokens, the newlines of `newline_rule` and the tokens to be
    generated are not counted, as in the official code.

    Raises:
        UserError: the instruction alone fills `max_context_len`.
    """
    instruction_tokens = len(tokenizer.encode(sample.instruction))
    budget = max_context_len - instruction_tokens
    if budget < 1:
        raise UserError(
            f"sample {sample.sample_id}: the instruction alone has {instruction_tokens} tokens and "
            f"the context holds {max_context_len}; use a larger context length"
        )
    text = place_markers(full_text(sample.context, sample.choices, lettered), len(sample.images))
    kept = truncate(text, sample.images, tokenizer, budget, tokens_per_image)
    return Prompt(
        text=sample.instruction + "\n" + kept.text(),
        images=kept.images,
        images_total=len(sample.images),
        truncated=kept.truncated,
    )
