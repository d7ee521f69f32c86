"""What a sequence asks of a cache: tokens by precision in every layer, and their exact bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.cache.contract import (
    DEFERRED,
    EVICTED,
    EXACT,
    LayerQuantizer,
    LayerSpec,
    Plan,
    Side,
    Tokens,
    Window,
)
from kvbench.cache.windows import HeavyHitters, Residual, Sliding
from kvbench.errors import UserError

ROW_ALIGNMENT = 16
"""Room for packed tokens comes in multiples of this: rows then start at aligned addresses."""


@dataclass(frozen=True)
class Workload:
    """Equal sequences that run together: a prompt, of which some tokens are vision, and answers."""

    input_tokens: int
    vision_tokens: int
    output_tokens: int
    batch: int = 1

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a count that no sequence can have.
        """
        if min(self.input_tokens, self.output_tokens, self.batch) < 1:
            raise UserError("input tokens, output tokens and batch must be at least 1.")
        if not 0 <= self.vision_tokens < self.input_tokens:
            raise UserError(
                f"{self.vision_tokens} vision tokens don't fit in a prompt of "
                f"{self.input_tokens} tokens with at least one of text."
            )

    @property
    def cached_tokens(self) -> int:
        """Tokens of a row in the cache at the end: the last answer token is never fed back."""
        return self.input_tokens + self.output_tokens - 1

    @property
    def images(self) -> slice:
        """The vision tokens: text, then all images, then the rest of the text."""
        start = (self.input_tokens - self.vision_tokens) // 2
        return slice(start, start + self.vision_tokens)

    @property
    def is_vision(self) -> Tensor:
        """(1, input) bool."""
        mask = torch.zeros(1, self.input_tokens, dtype=torch.bool)
        mask[:, self.images] = True
        return mask


@dataclass(frozen=True)
class SideLayout:
    """Room for the keys or the values of one layer, in tokens of a row."""

    packed: Mapping[int, int]
    """Bits below 16 -> tokens."""
    exact: int
    """Tokens that stay exact for good, such as pivots, besides those of the ring."""
    ring: int
    """The newest tokens."""
    token_bytes: Mapping[int, float]
    """Bits, 16 included -> bytes of a token over all heads."""

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        packed = sum(tokens * self.token_bytes[bits] for bits, tokens in self.packed.items())
        return round(packed + (self.exact + self.ring) * self.token_bytes[EXACT])


@dataclass(frozen=True)
class LayerLayout:
    """Room of one layer, and which bits its generated tokens get."""

    key: SideLayout
    value: SideLayout
    generated: int

    @property
    def sides(self) -> tuple[SideLayout, SideLayout]:
        """Keys, values."""
        return self.key, self.value


@dataclass(frozen=True)
class CacheLayout:
    """Room of a whole cache for one row of a workload."""

    layers: tuple[LayerLayout, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row when it is full, to the byte what a static cache allocates for it."""
        return sum(side.nbytes for layer in self.layers for side in layer.sides)

    def read_nbytes(self, tokens: int) -> float:
        """Bytes that one decode step reads for a row of `tokens` tokens, its own among them."""
        return sum(_read(side, layer.generated, tokens) for layer, side in self._sides())

    def _sides(self) -> Iterator[tuple[LayerLayout, SideLayout]]:
        return ((layer, side) for layer in self.layers for side in layer.sides)


def cache_layout(
    quantizers: Sequence[LayerQuantizer],
    specs: Sequence[LayerSpec],
    workload: Workload,
    itemsize: int = 2,
) -> CacheLayout:
    """Room for a workload in a cache that keeps exact tokens at `itemsize` bytes a number.

    A plan that depends on the data is asked about made-up prompts with many and without any
    massive activations; the room is for the worse of them, precision by precision.
    """
    return CacheLayout(
        tuple(
            _layer_layout(quantizer, spec, workload, itemsize)
            for quantizer, spec in zip(quantizers, specs, strict=True)
        )
    )


def ring_tokens(window: Window | None, total: int) -> int:
    """The most tokens that a window holds while a step attends.

    Raises:
        UserError: a window of a kind that no bound is known for.
    """
    if window is None:
        return 0
    if isinstance(window, Sliding):
        most = window.size + window.flush_every - 1 + (not window.counts_current)
        return min(most, total)
    if isinstance(window, Residual):
        return min(window.size, total)
    if isinstance(window, HeavyHitters):
        return min(window.keep(total, total) + 1, total)
    raise UserError(f"no bound is known for the tokens in a {type(window).__name__} window.")


def generated_bits(plan: Plan, before: int | None = None) -> int:
    """Bits of a generated token that has so many tokens before it; None: enough of them."""
    token = Tokens(torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool))
    seen = None if before is None else (before,)
    return int(plan.generated(replace(token, before=seen)).item())


def _layer_layout(
    quantizer: LayerQuantizer, spec: LayerSpec, workload: Workload, itemsize: int
) -> LayerLayout:
    most = _prompt_tokens(quantizer.plan, workload)
    generated = generated_bits(quantizer.plan)
    if generated == DEFERRED:  # any tier: room for the widest
        generated = max(quantizer.key.codecs, default=EXACT)
    key, value = (
        _side_layout(side, spec, workload, most, generated, itemsize)
        for side in (quantizer.key, quantizer.value)
    )
    return LayerLayout(key, value, generated)


def _prompt_tokens(plan: Plan, workload: Workload) -> Counter[int]:
    """Bits -> the most tokens of the prompt that get them."""
    length = workload.input_tokens
    most: Counter[int] = Counter()
    for massive in (0, length):
        residual = torch.zeros(1, length, 2)
        residual[0, :massive, 0] = 1e4
        residual[0, massive // 4 :, 0] = 0  # the median stays small
        tokens = Tokens(torch.ones(1, length, dtype=torch.bool), workload.is_vision, residual)
        most |= Counter(plan.prompt(tokens).flatten().tolist())
    return most


def _side_layout(
    side: Side,
    spec: LayerSpec,
    workload: Workload,
    prompt: Counter[int],
    generated: int,
    itemsize: int,
) -> SideLayout:
    heads, channels = side.transform.stored_shape(spec)
    total, answers = workload.cached_tokens - prompt[EVICTED], workload.output_tokens - 1
    # Tokens that are exact anyway wait for nothing: the ring is all of their storage.
    ring = total if generated == EXACT else ring_tokens(side.window, total)
    packed = {}
    for bits, codec in side.codecs.items():
        if bits == EXACT or not (prompt[bits] or bits == generated):
            continue
        room = prompt[bits] + (answers if bits == generated else 0)
        if answers >= ring:  # the ring ends up with generated tokens alone
            room -= ring if bits == generated else 0
        room = _multiple(min(room, total - ring), max(codec.block or 1, ROW_ALIGNMENT))
        packed[bits] = room
    exact = 0 if generated == EXACT else min(prompt[EXACT], total)
    sizes = {
        bits: heads * channels * side.codecs[bits].bits_per_element(channels) / 8 for bits in packed
    }
    return SideLayout(packed, exact, ring, {**sizes, EXACT: heads * channels * itemsize})


def _multiple(tokens: int, step: int) -> int:
    return -(-max(tokens, 0) // step) * step


def _read(side: SideLayout, generated: int, tokens: int) -> float:
    """Bytes of one side that a step reads: the room, less what later tokens will fill."""
    exact = side.exact + min(side.ring, tokens - side.exact)
    left = tokens - exact
    read = exact * side.token_bytes[EXACT]
    for bits, room in sorted(side.packed.items(), key=lambda pair: pair[0] == generated):
        taken = min(room, left)
        read += taken * side.token_bytes[bits]
        left -= taken
    return read
