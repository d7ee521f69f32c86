"""What one layer of a cache holds: rows, tiers and windows, in transformers' layer interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.attention import StoredStates
from kvbench.cache.contract import (
    EVICTED,
    DeferringPlan,
    LayerQuantizer,
    LayerSpec,
    Protocols,
    RankingWindow,
    SelfAttention,
    Tokens,
    Transform,
)
from kvbench.cache.mass import block_size, column_mass, drawn
from kvbench.cache.observers import Observed
from kvbench.cache.ragged import Lengths, Ragged, left_aligned, within
from kvbench.cache.storage import SideStore
from kvbench.errors import UserError


class StoredLayer(CacheLayerMixin):
    """Keys and values of one layer as a method stores them; `QuantizedLayer` attends to them.

    The stores' rows are the batch's, or the key/value heads of these one after another where heads
    are apart: R of them.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        quantizer: LayerQuantizer,
        spec: LayerSpec,
        protocol: Protocols,
        observed: Observed,
    ) -> None:
        """An empty layer."""
        super().__init__()
        self.quantizer, self.spec = quantizer, spec
        self.protocol, self.observed = protocol, observed
        self.is_sliding = spec.sliding_window is not None
        self.packed_tokens_read: list[int] = []
        """Tokens that attention had in fewer than 16 bits, for each row; evicted ones had none."""
        self.tokens: list[int] = []
        """Valid tokens that each row has seen, evicted ones among them."""
        self._seen = 0
        self._heads = spec.num_kv_heads if quantizer.heads_apart else 1
        self._keeps_slots = self.is_sliding or quantizer.key.pre_rope
        self._ranks = isinstance(quantizer.key.window, RankingWindow)
        self._defers = isinstance(quantizer.plan, DeferringPlan)
        # Keys and values of a token meet by their order, which mixed precision would change.
        self._chronological = quantizer.key.window != quantizer.value.window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for this many rows."""
        rows = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        stored = rows * self._heads
        self.key_store = SideStore(self.quantizer.key, self.spec, stored, "key")
        self.value_store = SideStore(self.quantizer.value, self.spec, stored, "value")
        self.packed_tokens_read, self.tokens = [0] * rows, [0] * rows
        self.is_initialized = True

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        if not self.is_initialized:
            return 0
        stores = (self.key_store, self.value_store)
        return sum(s.nbytes + len(self.tokens) * s.transform.row_nbytes() for s in stores)

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's tokens."""
        stored = range(row * self._heads, (row + 1) * self._heads)
        return sum(
            s.transform.row_nbytes() + sum(s.row_nbytes(i) for i in stored)
            for s in (self.key_store, self.value_store)
        )

    @property
    def elements(self) -> list[int]:
        """Numbers (keys and values of valid tokens) the storage stands for, for each row."""
        per_token = 2 * self.spec.num_kv_heads * self.spec.head_dim
        return [tokens * per_token for tokens in self.tokens]

    def get_seq_length(self) -> int:
        """Columns ever seen, padding included."""
        return self._seen

    def get_max_length(self) -> int:
        """The sliding window, or -1."""
        return self.spec.sliding_window or -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return self.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for transformers' masks."""
        window = self.spec.sliding_window
        offset = max(self._seen - window + 1, 0) if window else 0
        return self._seen - offset + query_length, offset

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        if self.is_initialized:
            heads = torch.arange(self._heads, device=beam_idx.device)
            stored = (beam_idx[:, None] * self._heads + heads).flatten()
            for store in (self.key_store, self.value_store):
                store.transform = store.transform.select(beam_idx)
                store.select(stored)
            rows = beam_idx.tolist()
            self.packed_tokens_read = [self.packed_tokens_read[i] for i in rows]
            self.tokens = [self.tokens[i] for i in rows]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            rows = len(self.tokens)
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget everything and let its memory go."""
        if self.is_initialized:
            del self.key_store, self.value_store
        self.is_initialized, self._seen = False, 0
        self.packed_tokens_read, self.tokens = [], []

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported: codes of a group can't be taken apart again."""
        raise UserError(
            "a quantized cache can't be cropped; switch assisted and prompt-lookup decoding off."
        )

    def offload(self) -> None:
        """Not supported."""
        raise UserError("a quantized cache can't be offloaded; use a smaller batch instead.")

    def prefetch(self) -> None:
        """Not supported."""
        self.offload()

    def _tokens(self, attention: SelfAttention) -> Tokens:
        rows, _, new, _ = attention.keys.shape
        observed = self.observed
        valid = observed.valid
        if valid is None or valid.shape != (rows, new):
            valid = torch.ones(rows, new, dtype=torch.bool)
        residual = observed.residual.pop(self.spec.index, None)
        return Tokens(valid, observed.is_vision, residual, attention, tuple(self.tokens))

    def _store(self, step: StoredStates, tokens: Tokens) -> None:
        """Ask the plan, take what it keeps into the stores, and let them settle after a prompt."""
        first, new = not self._seen, step.keys.shape[2]
        self._seen += new
        seen = tokens.valid.sum(1).tolist()
        self.tokens = list(map(sum, zip(self.tokens, seen, strict=True)))
        tiers = self._planned(tokens, first)
        if self.protocol == "sparse_prefill":
            unimportant = torch.tensor(self.quantizer.sparse_tiers, dtype=tiers.dtype)
            step.sparse = ~torch.isin(tiers, unimportant)
            step.sparse[:, -1] = True
            step.sparse &= tokens.valid
        kept = tokens.valid
        if self._heads > 1:
            kept = kept.repeat_interleave(self._heads, 0)
        if self.quantizer.evicts:
            kept = kept & (tiers != EVICTED)
        counts: Lengths = tuple(seen if kept is tokens.valid else kept.sum(1).tolist())
        tiers_of = left_aligned(tiers[:, None], kept, counts)
        kept = kept.to(step.keys.device, non_blocking=True)
        slots = self._new_slots(kept, counts) if self._track(new) else None
        scores = None
        if self._ranks:
            mass = column_mass(tokens) if first else torch.zeros_like(step.keys[..., 0]).float()
            scores = left_aligned(self._apart(mass), kept, counts)
        for store, states in self._sides(step):
            if first:
                store.transform = store.side.transform.fit(states, tokens)
            stored = left_aligned(self._apart(store.transform.store(states)), kept, counts)
            keys = store is self.key_store
            store.append(stored, tiers_of, slots if keys else None, scores if keys else None)
        if first or new > 1:
            self._settle(cast(SelfAttention, tokens.attention), first)
            step.settled = True
        elif not self._ranks and not self._defers:
            self._shrink(before_attention=True)

    def _planned(self, tokens: Tokens, first: bool) -> Tensor:
        """(R, n) int8 tiers on the host."""
        plan = self.quantizer.plan
        tiers = (plan.prompt(tokens) if first else plan.generated(tokens)).cpu()
        rows, new = tokens.valid.shape
        if tiers.dim() > 2 and not self.quantizer.heads_apart:
            raise UserError("a plan with tiers for each head needs LayerQuantizer.heads_apart.")
        if self._heads > 1:
            tiers = tiers if tiers.dim() > 2 else tiers[:, None]
            tiers = tiers.expand(rows, self._heads, new).reshape(-1, new)
        if self._chronological and tiers[tiers != EVICTED].unique().numel() > 1:
            raise UserError("keys and values of mixed precision must share their window.")
        return tiers

    def _sides(self, step: StoredStates) -> Iterator[tuple[SideStore, Tensor]]:
        """Each store with its new states, before RoPE where it wants them so."""
        keys, new = step.keys, step.keys.shape[2]
        if self.quantizer.key.pre_rope:
            columns = torch.arange(self._seen - new, self._seen, device=keys.device)
            keys = self.observed.rotary.strip(keys, columns.expand(keys.shape[0], -1))
        yield self.key_store, keys
        yield self.value_store, step.values

    def _apart(self, x: Tensor) -> Tensor:
        """(B, H, ...) as the rows of the stores: (B · H, 1, ...) where heads are apart."""
        return x.flatten(0, 1).unsqueeze(1) if self._heads > 1 else x

    def _shrink(self, before_attention: bool = False) -> None:
        """Let windows go of what is too old: before a token attends, those that count it."""
        for store in (self.key_store, self.value_store):
            window = store.side.window
            if not before_attention or window is None or window.counts_current:
                store.flush()

    def _settle(self, attention: SelfAttention, first: bool = False) -> None:
        """Move what leaves the windows, ranked by attention and with settled tiers."""
        keys, stores = self.key_store, (self.key_store, self.value_store)
        if self._ranks and not first:
            scores, mass = cast(Ragged, keys.scores), self._recent_mass(attention)
            keys.scores = Ragged(scores.data + mass[:, None], scores.lengths)
        order = keys.ranked() if self._ranks else None
        if order is not None:
            for store in stores:
                store.reorder(order)
        if self._defers and keys.undecided:
            plan, leave = cast(DeferringPlan, self.quantizer.plan), keys.leaving
            newest = replace(attention, query=attention.query[:, :, -1:])
            mass = self._recent_mass(newest)[:, : max(leave)]
            tiers = plan.settle(mass, leave).to("cpu", torch.int8)
            for store in stores:
                store.settle(tiers)
        self._shrink()

    def _track(self, new: int) -> bool:
        """Slots order a prompt's own tokens; sliding windows and RoPE on read need them always."""
        prompts = self.protocol == "quantized_prefill" or self._ranks
        return self._keeps_slots or (new > 1 and prompts)

    def _new_slots(self, kept: Tensor, counts: Lengths) -> Ragged:
        columns = torch.arange(
            self._seen - kept.shape[1], self._seen, dtype=torch.int32, device=kept.device
        )
        return left_aligned(columns.expand(kept.shape)[:, None], kept, counts)

    def read(self) -> tuple[Ragged, Ragged]:
        """Stored keys and values, decoded, in the basis of attention: (R, H, T, D)."""
        return self._read_side(self.key_store), self._read_side(self.value_store)

    def _read_side(self, store: SideStore) -> Ragged:
        rows = store.read(self.dtype)
        states = rows.data
        if type(store.transform).read is not Transform.read:
            whole = states.reshape(len(self.tokens), -1, *states.shape[2:])
            states = self._apart(store.transform.read(whole))
        if store.side.pre_rope:
            states = self.observed.rotary.embed(states, store.slots().data[:, 0])
        return Ragged(states, rows.lengths)

    def _queries(self, query: Tensor) -> Tensor:
        """(B, Hq, n, D) in the basis of the keys, for the rows of the stores: (R, Hq', n, D)."""
        turned = self.key_store.transform.attend(query)
        if self._heads == 1:
            return turned
        return turned.unflatten(1, (self._heads, -1)).flatten(0, 1)

    def _recent_mass(self, attention: SelfAttention) -> Tensor:
        """(R, n) float32: attention that tokens in the window draw from these queries."""
        query, keys = self._queries(attention.query), self._read_side(self.key_store)
        new, width = query.shape[2], keys.data.shape[2]
        visible = self._visible(new, keys.lengths, width, None)
        total = torch.zeros(keys.data.shape[:3], device=self.device)
        size = block_size(query.shape[0] * query.shape[1] * width)
        for part in (slice(start, start + size) for start in range(0, new, size)):
            seen = None if visible is None else visible[:, :, part]
            scaling, softcap = attention.scaling, attention.softcap
            total += drawn(query[:, :, part], keys.data, seen, scaling, softcap)
        recent = self.key_store.recent.lengths
        start = tuple(a - b for a, b in zip(keys.lengths, recent, strict=True))
        return Ragged(total.sum(1, keepdim=True), keys.lengths).slice(start, recent).data[:, 0]

    def _visible(
        self, new: int, lengths: Lengths, width: int, mask: Tensor | None
    ) -> Tensor | None:
        """(B, 1, n, T) bool or None when every query sees every stored token.

        `mask` is the model's own, over columns; it rules in the first prompt, where it may be more
        than causal (prefix language models, images that see all of themselves).
        """
        ordered = self.key_store.has_slots
        if not ordered and len(set(lengths)) == 1:
            return None
        if not ordered:
            return within(lengths, width, self.device)[:, None, None].expand(-1, -1, new, -1)
        slots = self.key_store.slots()
        if mask is not None and mask.dtype == torch.bool and mask.shape[-1] == self._seen == new:
            here = within(lengths, width, self.device)[:, None, None]
            columns = slots.data[:, :, None].clamp_min(0).long().expand(-1, -1, new, -1)
            mask = mask.expand(len(self.tokens), 1, -1, -1)
            if self._heads > 1:
                mask = mask.repeat_interleave(self._heads, 0)
            return here & mask.gather(3, columns)
        return self._causal(slots, new)

    def _causal(self, slots: Ragged, new: int) -> Tensor:
        """(B, 1, n, T) bool: which tokens, by their columns (B, 1, T), the newest n queries see."""
        here = within(slots.lengths, slots.data.shape[2], self.device)[:, None, None]
        place = slots.data[:, :, None]
        columns = torch.arange(self._seen - new, self._seen, device=self.device)[:, None]
        visible = here & (place <= columns)
        if self.spec.sliding_window:
            visible = visible & (place > columns - self.spec.sliding_window)
        return visible
