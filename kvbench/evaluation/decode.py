"""Greedy answers of a batch, measured against the 16-bit cache's own answers on the way.

When an answer parts from its reference, every row gets a twin from the same cache that is fed the
reference instead, so the distance between both caches is measured at every answer token from one
prefill (teacher forcing).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvbench.cache import ForeignCache, QuantizedCache, cache_argument
from kvbench.cache.specs import layer_specs

if TYPE_CHECKING:
    from transformers import Cache

    from kvbench.models.inputs import ModelInputs

REFERENCE_TOKENS = 64
"""Positions of an answer at which distributions are compared, at most."""


@dataclass(frozen=True)
class Generation:
    """How answers are generated: greedily."""

    max_new_tokens: int
    min_new_tokens: int = 1

    def row(self) -> dict[str, Any]:
        """What a result row says about it."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "do_sample": False,
        }


@dataclass(frozen=True)
class Usage:
    """What one row's prompt takes in the cache, and what was read of it since."""

    nbytes: int
    bits_per_element: float
    packed_tokens_read: int | None
    """None for a peer's cache, which doesn't count."""


@dataclass
class Answer:
    """One row's answer.

    `log_probs` are (V,) float32 at each of the answer's positions, the end-of-sequence token's
    included, at most REFERENCE_TOKENS of them; `divergences` are KL(reference || this) in nats at
    the reference's positions.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    usage: Usage | None = None


@dataclass(frozen=True)
class Answers:
    """The answers of a batch and where the time went, in seconds a batch."""

    rows: list[Answer]
    seconds: dict[str, float]


@torch.no_grad()
def answer(
    model: Any,
    inputs: ModelInputs,
    cache: Cache,
    generation: Generation,
    references: Sequence[Answer] | None = None,
    peer: ForeignCache | None = None,
) -> Answers:
    """Answer B prompts greedily; with references, measure divergence from them on the way.

    Without references the log-probabilities are kept, to be a reference for others. `peer` is whose
    cache it is, if it isn't ours.
    """
    started = now(model)
    logits = prefill(model, inputs, cache, split=peer is not None and peer.splits_prompt)
    prefilled = now(model)
    foreign = (
        None if peer is None else peer_usage(model, peer.nbytes(cache), *inputs.input_ids.shape)
    )
    usages = cache.rows() if isinstance(cache, QuantizedCache) else None
    run = _Run(model, inputs, cache, generation, references)
    run.decode(logits)
    for index, row in enumerate(run.answers):
        # Bytes are those of the prompt; reads go on while decoding.
        usage = foreign if usages is None else usages[index]
        if usage is not None:
            row.usage = Usage(usage.nbytes, usage.bits_per_element, run.reads.get(index))
    finished = now(model)
    return Answers(run.answers, {"prefill": prefilled - started, "decode": finished - prefilled})


class _Run:
    """Decoding of one batch.

    As long as every row says what its reference says, one row serves for both. When the first row
    parts from its reference, all rows are doubled: rows 2i are free, rows 2i + 1 follow
    reference i.
    """

    def __init__(
        self,
        model: Any,
        inputs: ModelInputs,
        cache: Cache,
        generation: Generation,
        references: Sequence[Answer] | None,
    ) -> None:
        self._model, self._cache, self._generation = model, cache, generation
        self._references, self._twins = references, False
        # Peers' caches can't double their rows: they are compared at the first token only.
        self._follows = references is not None and isinstance(cache, QuantizedCache)
        self._mask = inputs.attention_mask
        self._stops = _stop_ids(model)
        self.answers = [Answer() for _ in range(inputs.input_ids.shape[0])]
        self.reads: dict[int, int] = {}
        self._open = set(range(len(self.answers)))

    def decode(self, logits: Tensor) -> None:
        """Generate from the prompt's last logits (B, V) until every row and its twin are done."""
        self._compare(0, logits)
        tokens = self._choose(0, logits)
        step = 1
        while self._open or self._following(step):
            if not self._twins and self._parted(step, tokens):
                self._cache.batch_repeat_interleave(2)
                self._mask = self._mask.repeat_interleave(2, 0)
                self._twins = True
            logits = self._forward(self._fed(step, tokens))
            self._compare(step, logits[1::2] if self._twins else logits)
            tokens = self._choose(step, logits[::2] if self._twins else logits)
            step += 1

    def _choose(self, step: int, logits: Tensor) -> list[int]:
        """Next tokens of the free rows; rows that end or are full are closed."""
        if step < self._generation.min_new_tokens:
            logits = logits.clone()
            logits[:, self._stops] = -torch.inf
        chosen: list[int] = logits.argmax(-1).tolist()
        for row in sorted(self._open):
            self._keep_reference(row, logits[row])
            if chosen[row] not in self._stops:
                self.answers[row].ids.append(chosen[row])
                if len(self.answers[row].ids) < self._generation.max_new_tokens:
                    continue
            self._close(row)
        return chosen

    def _close(self, row: int) -> None:
        """End a row's answer; what its place in the batch reads from now on is for other rows."""
        self._open.discard(row)
        if isinstance(self._cache, QuantizedCache):
            place = row * (self._mask.shape[0] // len(self.answers))
            self.reads[row] = sum(layer.packed_tokens_read[place] for layer in self._cache.layers)

    def _keep_reference(self, row: int, logits: Tensor) -> None:
        kept = self.answers[row].log_probs
        if self._references is None and len(kept) < REFERENCE_TOKENS:
            kept.append(logits.float().log_softmax(-1))

    def _compare(self, step: int, logits: Tensor) -> None:
        """KL of every row at this step against its reference, if it has a position there."""
        if self._references is None or (step and not self._follows):
            return
        logits = logits.clone()
        if step < self._generation.min_new_tokens:
            logits[:, self._stops] = -torch.inf
        for row, reference in enumerate(self._references):
            if step < len(reference.log_probs):
                mine = logits[row].float().log_softmax(-1)
                self.answers[row].divergences.append(_divergence(reference.log_probs[step], mine))

    def _following(self, step: int) -> bool:
        """Whether a reference has positions left to compare."""
        references = self._references or ()
        return self._follows and any(step < len(r.log_probs) for r in references)

    def _parted(self, step: int, tokens: list[int]) -> bool:
        """Whether a row would be fed another token than its reference with positions left."""
        references = self._references or ()
        return self._follows and any(
            step < len(reference.log_probs) and reference.ids[step - 1] != token
            for token, reference in zip(tokens, references, strict=True)
        )

    def _fed(self, step: int, tokens: list[int]) -> list[int]:
        """Input tokens of all rows for this step."""
        if not self._twins:
            return tokens
        fed = []
        for token, reference in zip(tokens, self._references or (), strict=True):
            ids = reference.ids
            fed += [token, ids[step - 1] if step <= len(ids) else token]
        return fed

    def _forward(self, tokens: list[int]) -> Tensor:
        self._mask = torch.cat((self._mask, torch.ones_like(self._mask[:, :1])), 1)
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        return decode_step(self._model, ids, self._mask, self._cache)


@torch.no_grad()
def prefill(model: Any, inputs: ModelInputs, cache: Cache, *, split: bool = False) -> Tensor:
    """Logits (B, V) after the prompts; `split` decodes each prompt's last token on its own."""
    if split and inputs.input_ids.shape[1] > 1:
        prefill(model, without_last(inputs), cache)
        return decode_step(model, inputs.input_ids[:, -1:], inputs.attention_mask, cache)
    return prompt_logits(model, inputs, cache, 1)[:, -1]


@torch.no_grad()
def prompt_logits(model: Any, inputs: ModelInputs, cache: Cache, last: int) -> Tensor:
    """Logits (B, last, V) at the prompts' last positions; 0 is all of them."""
    extra = {}
    # Counted from each row's first token, so that padding doesn't move a row's keys.
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp_min(0)
    if not _multimodal_rope(model):
        extra["position_ids"] = positions
    elif "image_grid_thw" not in inputs.images:
        # The model itself would go on from the last prompt that had images.
        extra["position_ids"] = positions.expand(3, -1, -1)
        model.model.rope_deltas = torch.zeros_like(positions[:, :1])
    arguments: dict[str, Any] = {**inputs.kwargs(), **extra, **cache_argument(model, cache)}
    out = model(**arguments, use_cache=True, logits_to_keep=last)
    logits: Tensor = out.logits
    return logits


def without_last(inputs: ModelInputs) -> ModelInputs:
    """The prompts without their last tokens, which are text."""
    kinds = "mm_token_type_ids"
    images = inputs.images
    if kinds in images:
        images = {**images, kinds: images[kinds][:, :-1]}
    return replace(
        inputs,
        input_ids=inputs.input_ids[:, :-1],
        attention_mask=inputs.attention_mask[:, :-1],
        is_vision=inputs.is_vision[:, :-1],
        images=images,
    )


def decode_step(model: Any, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Logits (B, V) after one more token of each row, ids (B, 1); mask (B, T) includes it."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_next_positions(model, mask),
        **cache_argument(model, cache),
        use_cache=True,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def peer_usage(model: Any, nbytes: int, rows: int, width: int) -> Usage:
    """A row's share of a peer's cache; the peer stores padding too, so padding counts."""
    numbers = sum(2 * spec.num_kv_heads * spec.head_dim for spec in layer_specs(model.config))
    return Usage(nbytes // rows, 8 * nbytes / (rows * width * numbers), None)


def _next_positions(model: Any, mask: Tensor) -> Tensor:
    """Position of the newest token of each row, (B, 1), or (3, B, 1) for M-RoPE."""
    positions = mask.sum(1, keepdim=True) - 1
    if not _multimodal_rope(model):
        return positions
    deltas: Tensor = model.model.rope_deltas
    deltas = deltas.repeat_interleave(mask.shape[0] // deltas.shape[0], 0)
    return (positions + deltas.to(positions.device)).expand(3, -1, -1)


def _multimodal_rope(model: Any) -> bool:
    return hasattr(getattr(model, "model", None), "rope_deltas")


def _divergence(reference: Tensor, mine: Tensor) -> float:
    """KL(reference || mine) of two (V,) log-probability vectors, in nats."""
    # A masked token is impossible in both; 0 · (-inf + inf) must count as nothing.
    terms = reference.exp() * (reference - mine)
    return max(float(terms[reference > -torch.inf].sum()), 0.0)


def _stop_ids(model: Any) -> list[int]:
    stops = model.generation_config.eos_token_id
    if stops is None:
        return []
    return list(stops) if isinstance(stops, (list, tuple)) else [int(stops)]


def now(model: Any) -> float:
    """Seconds on a clock, once every device that the model is on is done with all it was given."""
    places = getattr(model, "hf_device_map", {"": model.device}).values()
    for device in {torch.device(place) for place in places}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()
