"""One layer of a quantized cache: attention over packed storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.attention import StoredStates, attend, attend_sparsely, attention
from kvbench.cache.contract import LogitMap, SelfAttention
from kvbench.cache.fused import attend_fused, unfused
from kvbench.cache.ragged import Lengths, Ragged, join
from kvbench.cache.stored import StoredLayer
from kvbench.errors import UserError
from kvbench.kernels.launch import use_triton


class QuantizedLayer(StoredLayer):
    """Stores what a method says and attends to it as stored.

    quantized_prefill: every query sees the storage. exact_prefill: prompt queries see exact states,
    except the last one, which sees the storage like every later token. sparse_prefill: as that, but
    only the tokens that a method finds important attend, to each other.
    """

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        """Take note of (B, H, n, D) states; the "kvbench" attention function stores them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = StoredStates(self, key_states, value_states)
        return step, step

    def store(
        self, query: Tensor, step: StoredStates, scaling: float, softcap: float | None = None
    ) -> None:
        """Store a step's keys and values, once, as what its queries (B, Hq, n, D) ask for."""
        if step.stored:
            return
        if self._exact_prompt(query.shape[2]) and self._seen:
            step.before = (*self.read(), self._slots_before())
        self._store(step, self._tokens(self._attention(query, step, scaling, softcap)))
        step.stored = True

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        step: StoredStates,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Store the step, attend (B, Hq, n, D), then let the windows settle.

        Raises:
            UserError: the model's attention has sinks of its own.
        """
        if options.get("s_aux") is not None:
            raise UserError("attention with learned sinks (GPT-OSS) can't read a quantized cache.")
        self.store(query, step, scaling, softcap)
        if self._exact_prompt(query.shape[2]):
            out = self._attend_exactly(
                module, query, step, attention_mask, scaling=scaling, softcap=softcap, **options
            )
            out[:, :, -1:] = self._attend_stored(query[:, :, -1:], scaling, softcap)
        else:
            out = self._attend_stored(query, scaling, softcap, attention_mask)
        if self._ranks or self._defers:
            if not step.settled:
                self._settle(self._attention(query, step, scaling, softcap))
        else:
            self._shrink()
        if not self._keeps_slots:
            self.key_store.forget_slots()
        return out

    def _exact_prompt(self, new: int) -> bool:
        return self.protocol != "quantized_prefill" and new > 1

    def _attention(
        self, query: Tensor, step: StoredStates, scaling: float, softcap: float | None
    ) -> SelfAttention:
        return SelfAttention(query, step.keys, scaling, softcap, self.spec.sliding_window)

    def _attend_stored(
        self, query: Tensor, scaling: float, softcap: float | None, mask: Tensor | None = None
    ) -> Tensor:
        shape = query.shape
        query = self._queries(query)
        out = None
        if self._fused(query):
            out = attend_fused(query, self.key_store, self.value_store, scaling, softcap)
        if out is None:
            out = self._attend_read(query, scaling, softcap, mask)
        self._count_reads()
        if self._heads > 1:
            out = out.reshape(*shape[:3], -1)
        return self.value_store.transform.attend(out)

    def _count_reads(self) -> None:
        packed, held = self.key_store.packed_lengths, self.key_store.lengths
        for row, tokens in enumerate(self.tokens):
            mine = slice(row * self._heads, (row + 1) * self._heads)
            evicted = tokens * self._heads - sum(held[mine])
            self.packed_tokens_read[row] += -(-(sum(packed[mine]) + evicted) // self._heads)

    def _fused(self, query: Tensor) -> bool:
        """Whether one kernel reads what is stored: one new token on CUDA that sees all of it."""
        return (
            query.shape[2] == 1
            and self.spec.sliding_window is None
            and use_triton(query)
            and unfused(self.quantizer) is None
        )

    def _attend_read(
        self, query: Tensor, scaling: float, softcap: float | None, mask: Tensor | None
    ) -> Tensor:
        """Attention on everything that is stored, decoded first."""
        keys, values = self.read()
        new, maps = query.shape[2], self._logit_maps()
        if softcap is None and not maps and self._plainly_causal(new, keys.lengths, mask):
            # In the order of the queries, attention skips what lies ahead: half of the work.
            order = self.key_store.slots().data.argsort(2)[..., None]
            k, v = (torch.take_along_dim(side.data, order, 2) for side in (keys, values))
            return attend(query, k, v, None, scaling, causal=True)
        visible = self._visible(new, keys.lengths, keys.data.shape[2], mask)
        return attend(query, keys.data, values.data, visible, scaling, softcap, maps=maps)

    def _logit_maps(self) -> list[tuple[LogitMap, Tensor]]:
        """Each map with its tokens, (R, T) bool in the order of the stores."""
        keys, maps = self.key_store, self.quantizer.logit_maps
        return [
            (change, keys.places(tier, self.device))
            for tier, change in maps.items()
            if max(keys.segments[tier].lengths)
        ]

    def _plainly_causal(self, new: int, lengths: Lengths, mask: Tensor | None) -> bool:
        """Whether this is a first prompt without padding, window or mask of the model's own."""
        window = self.spec.sliding_window
        return (
            mask is None
            and 1 < new == self._seen
            and set(lengths) == {new}
            and (window is None or window >= new)
        )

    def _slots_before(self) -> Ragged:
        """Columns (B, 1, T) of what is stored; -1 where nothing needs to know them any more."""
        if self._keeps_slots:
            return self.key_store.slots()
        lengths = self.key_store.lengths
        shape = (len(lengths), 1, max(lengths))
        return Ragged(torch.full(shape, -1, dtype=torch.int32, device=self.device), lengths)

    def _attend_exactly(
        self,
        module: nn.Module,
        query: Tensor,
        step: StoredStates,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        **options: Any,
    ) -> Tensor:
        """Prompt attention on exact new states, after stored ones if a conversation goes on."""
        if step.sparse is not None and step.before is None:
            window = self.spec.sliding_window
            return attend_sparsely(query, step, step.sparse, scaling, softcap, window)
        if step.before is None:
            out, _ = attention(
                module,
                query,
                step.keys,
                step.values,
                attention_mask,
                scaling=scaling,
                softcap=softcap,
                **options,
            )
            return out.transpose(1, 2)
        return self._attend_continued(query, step, step.before, scaling, softcap)

    def _attend_continued(
        self,
        query: Tensor,
        step: StoredStates,
        before: tuple[Ragged, Ragged, Ragged],
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        sides, new = [], query.shape[2]
        for store, old, states in zip(
            (self.key_store, self.value_store), before[:2], (step.keys, step.values), strict=True
        ):
            # Exact states in the basis of the stored ones; RoPE is already on these keys.
            fresh = store.transform.read(store.transform.store(states))
            sides.append(join((old, Ragged(self._apart(fresh), (new,) * len(old.lengths)))))
        visible, keys, values = self._continued_mask(before[2], new), sides[0].data, sides[1].data
        out = attend(self._queries(query), keys, values, visible, scaling, softcap)
        return self.value_store.transform.attend(out.reshape(*query.shape[:3], -1))

    def _continued_mask(self, old: Ragged, new: int) -> Tensor:
        """Stored tokens by their slots, then this step's own, of which padding is never seen."""
        columns = torch.arange(self._seen - new, self._seen, dtype=torch.int32, device=self.device)
        columns = columns.expand(len(old.lengths), 1, new)
        valid = self.observed.valid
        if valid is not None and valid.shape == (len(self.tokens), new):
            never = torch.iinfo(torch.int32).max
            valid = valid.repeat_interleave(self._heads, 0).to(self.device)
            columns = columns.masked_fill(~valid[:, None], never)
        return self._causal(join((old, Ragged(columns, (new,) * len(old.lengths)))), new)
