"""Prompt styles: from the text of a task to the exact text that a model reads.

A style takes text with `<ImageHere>` markers and returns the whole prompt, with the marker that its
family uses for an image. Text that only looks like a control token is taken apart first
(`neutral`), so that a document can neither open a turn nor claim an image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from kvbench.errors import UserError

IMAGE_HERE = "<ImageHere>"
IMAGE = "<image>"
QWEN_IMAGE = "<|image_pad|>"

_CONTROL = re.compile(r"<(?=image>|\|\w+\|>)")
_PROBE = f"first {IMAGE_HERE} second\nthird {IMAGE_HERE}"
_QWEN_BLOCK = f"<|vision_start|>{QWEN_IMAGE}<|vision_end|>"

_LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def neutral(text: str) -> str:
    """Put a blank behind the `<` of every `<image>` and `<|name|>`, which makes them plain text."""
    return _CONTROL.sub("< ", text)


@dataclass(frozen=True)
class PromptStyle:
    """A named prompt format.

    Attributes:
        name: What users call it.
        template: From the text of a user's turn to the prompt that ends where the answer begins.
        image: Marker that stands for one image in the rendered prompt.
        image_block: What `<ImageHere>` becomes: the marker with what the family puts around it.
    """

    name: str
    template: Callable[[str], str]
    image: str = IMAGE
    image_block: str = IMAGE

    def render(self, text: str) -> str:
        """Return the whole prompt for `text`, whose images stand as `<ImageHere>`."""
        return self.template(neutral(text).replace(IMAGE_HERE, self.image_block))

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever the style renders a fixed text differently."""
        return hashlib.sha256(self.render(_PROBE).encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """Name and fingerprint, as result rows carry them: `chatml@0123456789ab`."""
        return f"{self.name}@{self.fingerprint}"


def _llava_llama_2(text: str) -> str:
    return f"[INST] <<SYS>>\n{_LLAVA_SYSTEM}\n<</SYS>>\n\n{text} [/INST]"


def _vicuna_v1(text: str) -> str:
    return f"{_VICUNA_SYSTEM} USER: {text} ASSISTANT:"


def _chatml(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def _qwen2_vl(text: str) -> str:
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{_chatml(text)}"


def _plain(text: str) -> str:
    return text


STYLES: dict[str, PromptStyle] = {
    style.name: style
    for style in (
        # MileBench's official worker uses this one for every LLaVA, LLaVA-1.5 and 1.6 alike.
        PromptStyle("llava_llama_2", _llava_llama_2),
        # The format LLaVA-1.5 was trained with.
        PromptStyle("vicuna_v1", _vicuna_v1),
        PromptStyle("chatml", _chatml),
        PromptStyle("qwen2_vl", _qwen2_vl, QWEN_IMAGE, _QWEN_BLOCK),
        PromptStyle("plain", _plain),
    )
}
CHECKPOINT = "processor"  # the checkpoint's own chat template, known once the model is loaded
STYLE_NAMES = (*STYLES, CHECKPOINT)


def checkpoint_style(apply: Callable[[list[dict[str, object]]], str], *, qwen: bool) -> PromptStyle:
    """The style `processor`: one user turn through a checkpoint's chat template.

    Templates for images want a list of parts, others a string. Images stay inside the text part,
    because such templates move separate image parts to the front.

    Args:
        apply: Renders a list of messages and opens the assistant turn.
        qwen: Whether images stand as Qwen's vision block rather than as `<image>`.
    """

    def template(text: str) -> str:
        for content in ([{"type": "text", "text": text}], text):
            try:
                rendered = apply([{"role": "user", "content": content}])
            except Exception:  # a template is foreign code and may raise anything  # nosec B112
                continue
            if text.strip() in rendered and "'type'" not in rendered.replace(text.strip(), ""):
                return rendered
        raise UserError(
            "the checkpoint's chat template does not repeat the user's text:"
            f" choose another prompt style ({', '.join(STYLES)})"
        )

    marker, block = (QWEN_IMAGE, _QWEN_BLOCK) if qwen else (IMAGE, IMAGE)
    return PromptStyle(CHECKPOINT, template, marker, block)
