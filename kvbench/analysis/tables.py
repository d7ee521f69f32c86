"""Numbers of an analysis as CSV tables, one a figure; intervals have the ends low and high."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvbench.analysis.influence import Influence
from kvbench.analysis.outliers import outlier_ratio
from kvbench.analysis.patterns import LayerPattern
from kvbench.analysis.pivots import FEW
from kvbench.analysis.records import PromptRecord
from kvbench.analysis.summary import Mean, mean, mean_or_none

POSITION_BIN = 8
"""Tokens averaged along the positions of Figure 3, as in the paper."""


@dataclass(frozen=True)
class Table:
    """Named columns; None is an empty cell, numbers have six digits."""

    name: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]

    def csv(self) -> str:
        """The table with a header; every line ends in a line feed."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_cell(value) for value in row] for row in self.rows)
        return buffer.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def _ends(name: str) -> tuple[str, str, str]:
    return name, f"{name}_low", f"{name}_high"


def _values(found: Mean | None) -> tuple[float | None, ...]:
    return (None, None, None) if found is None else (found.value, found.low, found.high)


def patterns_table(patterns: Sequence[LayerPattern], text_salient: Sequence[int]) -> Table:
    """Table I by layer, with what it rests on."""
    rows = [
        (
            layer,
            "TSA" if layer in text_salient else "PSA" if each.is_pivot_salient else "neither",
            each.sure,
            *_values(each.ratio),
            each.heads_favouring,
            each.prompts_favouring,
            each.prompts,
            each.interval.low,
            each.interval.high,
            *_values(each.few),
        )
        for layer, each in enumerate(patterns)
    ]
    columns = ("layer", "pattern", "sure", *_ends("text_over_vision"), "heads_favouring_text")
    counted = ("prompts_favouring_text", "prompts", "share_low", "share_high")
    return Table("patterns", (*columns, *counted, *_ends(f"top{FEW}_share")), rows)


def heads_table(patterns: Sequence[LayerPattern]) -> Table:
    """Figure 4: mean attention on a text and on a vision token, by layer and head."""
    rows = [
        (layer, index, *_values(head.text), *_values(head.vision), *_values(head.ratio))
        for layer, each in enumerate(patterns)
        for index, head in enumerate(each.heads)
    ]
    ends = (*_ends("text"), *_ends("vision"), *_ends("ratio"))
    return Table("attention_by_head", ("layer", "head", *ends), rows)


def maps_table(prompt: PromptRecord, layers: Iterable[int]) -> Table:
    """Figure 1: mean attention of query bins on key bins in a few layers of one prompt."""
    size = prompt.bin_size
    rows = [
        (layer, query * size, key * size, size, float(prompt.attention[layer].grid[query, key]))
        for layer in layers
        for query in range(len(prompt.attention[layer].grid))
        for key in range(query + 1)
    ]
    return Table("attention_maps", ("layer", "query", "key", "bin_tokens", "attention"), rows)


def positions_table(prompt: PromptRecord) -> Table:
    """Figure 3: mean attention that keys get, by position and layer, of one prompt."""
    rows = []
    for layer, summary in enumerate(prompt.attention):
        parts = zip(
            summary.received.split(POSITION_BIN),
            prompt.is_vision.float().split(POSITION_BIN),
            strict=True,
        )
        for place, (weights, vision) in enumerate(parts):
            rows.append((layer, place * POSITION_BIN, float(vision.mean()), float(weights.mean())))
    return Table("attention_by_position", ("layer", "token", "vision_share", "attention"), rows)


def massive_table(prompts: Sequence[PromptRecord]) -> Table:
    """Massive activations by layer, means over prompts."""
    rows = []
    for layer in range(len(prompts[0].pivots)):
        found = [(prompt.pivots[layer], prompt.is_vision) for prompt in prompts]
        largest = [each.magnitude.sort(descending=True).values for each, _ in found]
        ranks = [
            mean([float(m[min(r, len(m)) - 1]) for m in largest]).value for r in (1, 2, 3, FEW)
        ]
        rows.append(
            (
                layer,
                *ranks,
                mean([each.median for each, _ in found]).value,
                *_values(mean([len(each.massive) for each, _ in found])),
                *_values(mean([sum(t > 0 for t in each.massive) for each, _ in found])),
                *_values(mean([sum(t > 0 for t in each.detected) for each, _ in found])),
                *_values(mean([int(kinds[each.detected].sum()) for each, kinds in found])),
            )
        )
    ranks_of = ("largest", "second", "third", f"rank{FEW}", "median")
    counts = ("massive", "massive_beyond_first", "detected_beyond_first", "detected_vision")
    return Table(
        "massive_activations",
        ("layer", *ranks_of, *(c for name in counts for c in _ends(name))),
        rows,
    )


def detector_table(prompts: Sequence[PromptRecord]) -> Table:
    """Precision and recall of the detector by layer, and the attention that its tokens draw."""
    names = ("precision", "recall", "overlap", "captured", "few")
    rows = []
    for layer in range(len(prompts[0].pivots)):
        found = [prompt.pivots[layer] for prompt in prompts]
        means = (mean_or_none([getattr(each, name) for each in found]) for name in names)
        dominant = mean([len(each.dominant) for each in found])
        beyond = mean([sum(t > 0 for t in each.dominant) for each in found])
        rows.append(
            (layer, *_values(dominant), *_values(beyond), *(v for m in means for v in _values(m)))
        )
    all_names = ("dominant", "dominant_beyond_first", *names[:-1], f"top{FEW}")
    columns = ("layer", *(c for name in all_names for c in _ends(name)))
    return Table("pivot_detector", columns, rows)


def pivots_table(prompt: PromptRecord, texts: Sequence[str]) -> Table:
    """The detected tokens of one prompt: what they are and the attention they draw."""
    rows = [
        (
            layer,
            rank,
            token,
            "vision" if prompt.is_vision[token] else "text",
            texts[token],
            float(each.magnitude[token]),
            float(each.attention[token]),
            token in each.massive,
            token in each.dominant,
        )
        for layer, each in enumerate(prompt.pivots)
        for rank, token in enumerate(each.detected, 1)
    ]
    kinds = ("modality", "text", "magnitude", "attention_share", "massive", "dominant")
    return Table("pivots", ("layer", "rank", "token", *kinds), rows)


def outliers_table(prompts: Sequence[PromptRecord]) -> Table:
    """Outlier ratio and crest of keys and values by layer, before and after the transform."""
    rows = []
    for layer in range(len(prompts[0].channels)):
        for side in ("keys", "values"):
            found = [prompt.channels[layer][side] for prompt in prompts]
            measured = (
                [outlier_ratio(each.before) for each in found],
                [outlier_ratio(each.after) for each in found],
                [each.crest_before for each in found],
                [each.crest_after for each in found],
            )
            rows.append((layer, side, *(v for values in measured for v in _values(mean(values)))))
    names = ("ratio_before", "ratio_after", "crest_before", "crest_after")
    return Table("outliers", ("layer", "side", *(c for name in names for c in _ends(name))), rows)


def channels_table(prompts: Sequence[PromptRecord]) -> Table:
    """Figure 5: channels of the head with the largest outlier of each side, before and after."""
    rows: list[tuple[Any, ...]] = []
    for side in ("keys", "values"):
        layers = [
            [prompt.channels[layer][side] for prompt in prompts]
            for layer in range(len(prompts[0].channels))
        ]
        before = [torch.stack([each.before for each in found]).mean(0) for found in layers]
        after = [torch.stack([each.after for each in found]).mean(0) for found in layers]
        ratios = {
            (layer, head): outlier_ratio(channels[head : head + 1])
            for layer, channels in enumerate(before)
            for head in range(len(channels))
        }
        layer, head = max(ratios, key=lambda place: ratios[place])
        pairs = zip(before[layer][head].tolist(), after[layer][head].tolist(), strict=True)
        rows += [(side, layer, head, channel, *pair) for channel, pair in enumerate(pairs)]
    return Table("channels", ("side", "layer", "head", "channel", "before", "after"), rows)


def errors_table(prompts: Sequence[PromptRecord]) -> Table:
    """Error budget: relative errors by layer and method, and what each layer's alone changes."""
    whole = [prompt.prompt_influences for prompt in prompts if prompt.prompt_influences]
    rows = []
    for spec in prompts[0].errors:
        for layer in range(len(prompts[0].pivots)):
            errors = [prompt.errors[spec][layer] for prompt in prompts]
            means = [mean([getattr(each, of) for each in errors]) for of in _ERRORS]
            exact = _moved([prompt.influences[spec][layer] for prompt in prompts])
            quantized = _moved([each[spec][layer] for each in whole])
            rows.append((spec, layer, *(v for m in means for v in _values(m)), *exact, *quantized))
    ends = (c for name in _ERRORS for c in _ends(name))
    moved = (
        column
        for protocol in ("exact", "quantized")
        for column in (*_ends(f"kl_{protocol}"), f"changed_{protocol}", f"prompts_{protocol}")
    )
    return Table("errors", ("method", "layer", *ends, *moved), rows)


_ERRORS = ("key", "value", "output")


def _moved(found: Sequence[Influence]) -> tuple[float | None, ...]:
    """Mean divergence with its interval, prompts with another first token, and all prompts."""
    divergence = mean_or_none([each.divergence for each in found])
    return *_values(divergence), sum(each.changed for each in found), len(found)
