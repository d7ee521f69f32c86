"""Peak memory and largest batch from shapes and method alone: no weights, no GPU.

What is counted: weights to the byte (`shapes`), cache to the byte (`workload`), the prompt's
activations by the widest moment of a layer, what a decode step keeps, and what the driver takes
for itself, which is measured once and stands here as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kvbench.cache.contract import (
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Protocols,
    Side,
)
from kvbench.cache.foreign import ForeignCache
from kvbench.cache.quantized import BoundMethod, compose, resolve
from kvbench.cache.specs import layer_specs
from kvbench.cache.statistics import statistic_shape
from kvbench.efficiency.decoder import unsupported_model
from kvbench.efficiency.shapes import ModelShape, model_shape
from kvbench.efficiency.support import unsupported
from kvbench.efficiency.workload import Workload, cache_layout
from kvbench.errors import UserError

CONTEXT = 690 << 20
"""Bytes of a CUDA context with the modules that torch and Triton load, as on Hopper cards."""
LIBRARIES = 40 << 20
"""Bytes of workspaces that torch's allocator holds for cuBLAS and attention."""
SLACK = 0.05
"""What the allocator reserves beyond what tensors need, as a share of passing tensors."""
_PROTOCOL: Protocols = "exact_prefill"


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device at the peak, by what they are for."""

    weights: int
    """Decoder, embeddings and head."""
    vision: int
    """Vision tower and projector."""
    activations: int
    """What passes: prompts under way, and copies that a cache makes of itself."""
    cache: int
    """Keys and values, full."""
    workspace: int
    """What decode steps and matrix products keep."""
    context: int
    """What the driver takes, and torch's allocator without need."""

    @property
    def allocated(self) -> int:
        """The peak that torch's allocator reports."""
        return self.total - self.context

    @property
    def total(self) -> int:
        """The peak that the driver reports for the process."""
        kept = self.weights + self.vision + self.cache + self.workspace
        return kept + self.activations + self.context


@dataclass(frozen=True)
class RowCost:
    """Bytes of one row of a workload."""

    cache: float
    """Keys and values when the row is full."""
    prompt: float
    """The row's cache at the end of its prompt, as the prompt's own run holds it."""
    passing: float
    """What comes and goes in a decode step."""
    moved: float
    """Cache bytes that a mean decode step reads and writes at the least."""


class Capacity:
    """One model and one method: what any workload takes."""

    def __init__(
        self, shape: ModelShape, row: Callable[[Workload], RowCost], together: bool
    ) -> None:
        """`together`: all prompts run at once, straight into the cache that grows."""
        self.shape, self.together = shape, together
        self._row = row
        self._known: dict[Workload, RowCost] = {}

    def row(self, workload: Workload) -> RowCost:
        """Cost of one row, whatever the batch."""
        alone = replace(workload, batch=1)
        if alone not in self._known:
            self._known[alone] = self._row(alone)
        return self._known[alone]

    def footprint(self, workload: Workload, prefill_rows: int = 8) -> Footprint:
        """Peak memory of a workload, its prompts run `prefill_rows` at a time."""
        batch, row = workload.batch, self.row(workload)
        prompt = prompt_nbytes(self.shape, workload)
        if self.together:
            ahead = row.cache - row.prompt  # room that decoding will fill
            activations = batch * max(prompt - ahead, row.passing)
            passing = batch * max(prompt, row.passing)
        else:
            activations = passing = min(batch, prefill_rows) * (prompt + row.prompt)
        return Footprint(
            weights=self.shape.language_bytes,
            vision=self.shape.vision_bytes,
            activations=round(activations),
            cache=round(batch * row.cache),
            workspace=LIBRARIES + batch * step_nbytes(self.shape),
            context=CONTEXT + round(SLACK * passing),
        )

    def largest_batch(self, workload: Workload, limit: int, prefill_rows: int = 8) -> int:
        """The most rows whose peak stays within `limit` bytes; 0 if not even one does."""

        def fits(batch: int) -> bool:
            return self.footprint(replace(workload, batch=batch), prefill_rows).total <= limit

        if not fits(1):
            return 0
        low, high = 1, 2
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def capacity(
    model: PreTrainedModel,
    method: str,
    *,
    text_salient_layers: tuple[int, ...] = (0, 1),
) -> Capacity:
    """The capacity model of a method on a model, which may be an empty one.

    Args:
        model: With its configuration and dtype, such as `shapes.empty_model` makes.
        method: Name and parameters.
        text_salient_layers: Layers with text-salient attention.

    Raises:
        UserError: The method is unknown or can't store such layers, or no model is known for its
            cache or for the model's vision tower.
    """
    shape = model_shape(model)
    resolved = resolve(method)
    if isinstance(resolved, ForeignCache):
        return Capacity(shape, _foreign(shape, resolved), together=True)
    specs = layer_specs(model.config, text_salient_layers)
    bound = BoundMethod(model, _quantizers(resolved, specs), tuple(specs), resolved, _PROTOCOL)
    return Capacity(shape, _packed(shape, bound), together=not _is_static(bound))


def nominal_bits(method: KVQuantizer | ForeignCache) -> str:
    """Bits of a stored key and value with their metadata, "2.25" or "K 8.25 V 4.25".

    As in a layer in the middle of a model with heads of 128 channels; several where a plan chooses.
    Exact tokens, which depend on the length, are not counted; a peer's cache says nothing: "-".
    """
    if isinstance(method, ForeignCache):
        return "-"
    specs = [LayerSpec(index, 32, 32, 32, 128) for index in range(32)]
    quantizer = _quantizers(method, specs)[16]
    key, value = (
        ", ".join(f"{bits:.4g}" for bits in sorted(_codec_bits(side)) or [16])
        for side in (quantizer.key, quantizer.value)
    )
    return key if key == value else f"K {key} V {value}"


def _codec_bits(side: Side) -> set[float]:
    return {codec.bits_per_element(128) for codec in side.codecs.values()}


def prompt_nbytes(shape: ModelShape, workload: Workload) -> float:
    """Bytes of a row's activations while its prompt runs: decoder or tower, whichever is wider."""
    decoder, tokens = shape.decoder, workload.input_tokens
    text = tokens * decoder.prompt
    vision = 0.0
    if shape.tower is not None:
        # The embeddings of the whole prompt wait for the images.
        patches = workload.vision_tokens * shape.tower.patches
        vision = patches * shape.tower.width + tokens * decoder.hidden
    return float(shape.itemsize * (max(text, vision) + decoder.vocabulary))


def step_nbytes(shape: ModelShape) -> int:
    """Bytes that a decode step's buffers take for a row: one layer's, and logits.

    Attention's partial results fill a device once, whatever the batch: a few MiB.
    """
    return shape.itemsize * (shape.decoder.step + shape.decoder.vocabulary)


def _packed(shape: ModelShape, bound: BoundMethod) -> Callable[[Workload], RowCost]:
    def row(workload: Workload) -> RowCost:
        layout, prompt = (
            cache_layout(bound.quantizers, bound.specs, each, shape.itemsize)
            for each in (workload, replace(workload, output_tokens=1))
        )
        # Without a kernel that reads codes, a step decodes a layer's keys and values as a whole.
        decoded = 0.0 if _is_static(bound) else 6 * _side_nbytes(shape, workload.cached_tokens)
        mean = min(workload.input_tokens + workload.output_tokens // 2, workload.cached_tokens)
        # Prompts go straight into a static cache.
        passing = 0 if _is_static(bound) else prompt.row_nbytes
        return RowCost(layout.row_nbytes, passing, decoded, layout.read_nbytes(mean))

    return row


def _foreign(shape: ModelShape, method: ForeignCache) -> Callable[[Workload], RowCost]:
    if method.concatenates:
        return lambda workload: _grown(shape, workload)
    return _quanto(shape, method)


def _grown(shape: ModelShape, workload: Workload) -> RowCost:
    """A cache that is copied whole, one side of a layer after another, to take a token."""
    layers = 2 * shape.decoder.layers
    mean = workload.input_tokens + workload.output_tokens / 2
    return RowCost(
        cache=layers * _side_nbytes(shape, workload.cached_tokens),
        prompt=layers * _side_nbytes(shape, workload.input_tokens),
        passing=_side_nbytes(shape, workload.cached_tokens),
        moved=3 * layers * _side_nbytes(shape, mean),  # copying reads and writes, attention reads
    )


def _quanto(shape: ModelShape, method: Any) -> Callable[[Workload], RowCost]:
    """Transformers' QuantizedCache: packed in blocks, decoded whole in every step.

    Raises:
        UserError: another library's cache, of which nothing is known.
    """
    if not all(hasattr(method, name) for name in ("bits", "group_size", "residual")):
        raise UserError(f"no memory model is known for the cache of {method.label}: measure it")
    share = (method.bits + 2 * 8 * shape.itemsize / method.group_size) / (8 * shape.itemsize)
    layers = 2 * shape.decoder.layers

    def stored(packed: int, exact: int) -> float:
        return layers * (share * _side_nbytes(shape, packed) + _side_nbytes(shape, exact))

    def row(workload: Workload) -> RowCost:
        total, prompt = workload.cached_tokens, workload.input_tokens
        exact = (total - prompt) % method.residual
        # A step decodes and joins both sides.
        passing = 4 * _side_nbytes(shape, total)
        if full := total - exact - prompt:
            # When the exact block is full, it packs everything again as well.
            before = stored(prompt + full - method.residual, method.residual)
            packing = before + 8 * _side_nbytes(shape, prompt + full)
            passing = max(passing, packing - stored(total - exact, exact))
        mean = prompt + workload.output_tokens / 2
        # Decoding writes, joining reads and writes, attention reads.
        moved = (share + 4) * _side_nbytes(shape, mean)
        kept = stored(total - exact, exact)
        return RowCost(kept, stored(prompt, 0), passing, layers * moved)

    return row


def _side_nbytes(shape: ModelShape, tokens: float) -> float:
    """Bytes of the exact keys, or values, of one layer."""
    return tokens * shape.decoder.states * shape.itemsize


def _quantizers(method: KVQuantizer, specs: Sequence[LayerSpec]) -> tuple[LayerQuantizer, ...]:
    """The method on every layer; statistics, where it needs them, are all ones."""
    ones = {name: torch.ones(statistic_shape(name, specs)) for name in method.needs.statistics}
    calibration = Calibration(ones) if ones else None
    return compose(method, specs, calibration)


def _is_static(bound: BoundMethod) -> bool:
    return not unsupported_model(bound.model) and not unsupported(bound, Workload(2, 0, 1))
