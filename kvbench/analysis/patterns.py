"""Text-salient and pivot-salient layers, found from attention (AKVQ-VL, Table I and Figure 4).

A layer favours text when, in most prompts, most of its heads give a far text token more weight than
a far vision token, as the same queries see both. It is pivot-salient (PSA) when the `FEW` tokens
that draw most hold at least half of its far attention: then text's lead is that of a few tokens.
Text-salient layers (TSA) are the first layers, as long as they favour text and aren't PSA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvbench.analysis.attention import AttentionSummary
from kvbench.analysis.summary import Mean, geometric_mean, mean, ratio
from kvbench.evaluation.statistics import Interval, wilson

HALF = 0.5


@dataclass(frozen=True)
class PromptAttention:
    """One layer on one prompt.

    Attributes:
        text: Mean weight on a far text token, for each head.
        vision: The same for a far vision token; both are empty when no query sees both kinds.
        few: Share of far attention that a few tokens hold.
    """

    text: list[float]
    vision: list[float]
    few: float

    @classmethod
    def of(cls, summary: AttentionSummary, few: float) -> PromptAttention:
        """From one run over a layer's attention."""
        if not summary.queries:
            return cls([], [], few)
        return cls(summary.text.tolist(), summary.vision.tolist(), few)

    @property
    def favouring(self) -> float:
        """Share of heads that favour text."""
        return fmean(t > v for t, v in zip(self.text, self.vision, strict=True))


@dataclass(frozen=True)
class HeadAttention:
    """One head over all prompts: mean weight on a text token, on a vision token, and the ratio."""

    text: Mean
    vision: Mean
    ratio: Mean


@dataclass(frozen=True)
class LayerPattern:
    """What kind of layer it is, and how sure that is.

    Attributes:
        heads: Each head; empty without images.
        text: Mean weight on a text token.
        vision: Mean weight on a vision token.
        ratio: Text over vision, geometric mean over prompts of the heads' geometric mean.
        heads_favouring: Share of heads that favour text, mean over prompts.
        prompts_favouring: Prompts in which most heads favour text.
        prompts: Prompts that say something about text and vision.
        interval: Wilson interval of the share of prompts that favour text.
        few: Share of far attention that a few tokens hold.
    """

    heads: list[HeadAttention]
    text: Mean | None
    vision: Mean | None
    ratio: Mean | None
    heads_favouring: float
    prompts_favouring: int
    prompts: int
    interval: Interval
    few: Mean

    @property
    def favours_text(self) -> bool:
        """Whether most heads favour text in most prompts."""
        return 2 * self.prompts_favouring > self.prompts

    @property
    def is_pivot_salient(self) -> bool:
        """Whether a few tokens hold half of the attention or more."""
        return self.few.value >= HALF

    @property
    def sure(self) -> bool:
        """Whether both judgements hold all over their intervals."""
        low, high = self.few.low, self.few.high
        if low is None or high is None or low < HALF <= high:
            return False
        favour_sure = self.interval.low > HALF or self.interval.high < HALF
        return self.is_pivot_salient or favour_sure


def pattern_of(prompts: Sequence[PromptAttention]) -> LayerPattern:
    """Put the prompts of one layer together.

    Raises:
        ValueError: there is no prompt.
    """
    seen = [prompt for prompt in prompts if prompt.text]
    few = mean([prompt.few for prompt in prompts])
    if not seen:
        return LayerPattern([], None, None, None, 0.0, 0, 0, Interval(0.0, 1.0), few)
    favouring = sum(prompt.favouring > HALF for prompt in seen)
    return LayerPattern(
        _heads(seen),
        mean([fmean(prompt.text) for prompt in seen]),
        mean([fmean(prompt.vision) for prompt in seen]),
        geometric_mean([geometric_mean(_ratios(prompt)).value for prompt in seen]),
        fmean(prompt.favouring for prompt in seen),
        favouring,
        len(seen),
        wilson(favouring, len(seen)),
        few,
    )


def text_salient_layers(patterns: Sequence[LayerPattern]) -> tuple[int, ...]:
    """The first layers, as long as they favour text and few tokens don't dominate."""
    found: list[int] = []
    for layer, pattern in enumerate(patterns):
        if not pattern.favours_text or pattern.is_pivot_salient:
            break
        found.append(layer)
    return tuple(found)


def _ratios(prompt: PromptAttention) -> list[float]:
    return [ratio(t, v) for t, v in zip(prompt.text, prompt.vision, strict=True)]


def _heads(prompts: Sequence[PromptAttention]) -> list[HeadAttention]:
    by_head = zip(*(zip(p.text, p.vision, _ratios(p), strict=True) for p in prompts), strict=True)
    return [
        HeadAttention(
            mean([text for text, _, _ in head]),
            mean([vision for _, vision, _ in head]),
            geometric_mean([quotient for _, _, quotient in head]),
        )
        for head in by_head
    ]
