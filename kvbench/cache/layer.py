"""One layer of a quantized cache: transformers' layer interface on top of packed storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.attention import StoredStates, attend, attention
from kvbench.cache.contract import LayerQuantizer, LayerSpec, Protocols, Tokens
from kvbench.cache.fused import attend_fused, unfused
from kvbench.cache.observers import Observed
from kvbench.cache.ragged import Lengths, Ragged, join, left_aligned, within
from kvbench.cache.storage import SideStore
from kvbench.errors import UserError
from kvbench.kernels.launch import use_triton


class QuantizedLayer(CacheLayerMixin):
    """Stores what a method says and attends to it as stored.

    quantized_prefill: every query sees the storage. exact_prefill: prompt queries see exact states,
    except the last one, which sees the storage like every later token.
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
        """Tokens that attention took from segments below 16 bits, for each row."""
        self._seen = 0
        self._keeps_slots = self.is_sliding or quantizer.key.pre_rope
        # Keys and values of a token meet by their order, which mixed precision would change.
        self._chronological = quantizer.key.window != quantizer.value.window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for this many rows."""
        rows = key_states.shape[0]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_store = SideStore(self.quantizer.key, self.spec, rows, "key")
        self.value_store = SideStore(self.quantizer.value, self.spec, rows, "value")
        self.packed_tokens_read = [0] * rows
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        """Store (B, H, n, D) states; what comes back is for the "kvbench" attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = self._tokens(key_states)
        step = StoredStates(self, key_states, value_states)
        if self._exact_prompt(key_states.shape[2]) and self._seen:
            step.before = (*self._read(), self._slots_before())
        self._store(key_states, value_states, tokens)
        self._seen += key_states.shape[2]
        return step, step

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
        """Attention output (B, Hq, n, D) for this step's queries, then the windows settle.

        Raises:
            UserError: the model's attention has sinks of its own.
        """
        if options.get("s_aux") is not None:
            raise UserError("attention with learned sinks (GPT-OSS) can't read a quantized cache.")
        if self._exact_prompt(query.shape[2]):
            out = self._attend_exactly(
                module, query, step, attention_mask, scaling=scaling, softcap=softcap, **options
            )
            out[:, :, -1:] = self._attend_stored(query[:, :, -1:], scaling, softcap)
        else:
            out = self._attend_stored(query, scaling, softcap, attention_mask)
        for store in (self.key_store, self.value_store):
            store.flush()
        if not self._keeps_slots:
            self.key_store.forget_slots()
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of every stored tensor."""
        if not self.is_initialized:
            return 0
        return self.key_store.nbytes + self.value_store.nbytes

    def row_nbytes(self, row: int) -> int:
        """Bytes of one row's tokens."""
        return self.key_store.row_nbytes(row) + self.value_store.row_nbytes(row)

    @property
    def elements(self) -> list[int]:
        """Numbers (keys and values of valid tokens) the storage stands for, for each row."""
        if not self.is_initialized:
            return []
        per_token = 2 * self.spec.num_kv_heads * self.spec.head_dim
        return [length * per_token for length in self.key_store.lengths]

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
            self.key_store.select(beam_idx)
            self.value_store.select(beam_idx)
            self.packed_tokens_read = [self.packed_tokens_read[i] for i in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            rows = len(self.key_store.lengths)
            self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.reorder_cache(indices)

    def reset(self) -> None:
        """Forget everything and let its memory go."""
        if self.is_initialized:
            del self.key_store, self.value_store
        self.is_initialized, self._seen, self.packed_tokens_read = False, 0, []

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

    def _exact_prompt(self, new: int) -> bool:
        return self.protocol == "exact_prefill" and new > 1

    def _tokens(self, keys: Tensor) -> Tokens:
        rows, _, new, _ = keys.shape
        observed = self.observed
        valid = observed.valid
        if valid is None or valid.shape != (rows, new):
            valid = torch.ones(rows, new, dtype=torch.bool)
        return Tokens(valid, observed.is_vision, observed.residual.pop(self.spec.index, None))

    def _store(self, keys: Tensor, values: Tensor, tokens: Tokens) -> None:
        plan, new = self.quantizer.plan, keys.shape[2]
        bits = plan.generated(tokens) if self._seen else plan.prompt(tokens)
        if self._chronological and bits.unique().numel() > 1:
            raise UserError("keys and values of mixed precision must share their window.")
        counts: Lengths = tuple(tokens.valid.sum(1).tolist())
        bits_of = left_aligned(bits.cpu()[:, None], tokens.valid, counts)
        valid = tokens.valid.to(keys.device, non_blocking=True)
        slots = self._new_slots(valid, counts) if self._track(new) else None
        if self.quantizer.key.pre_rope:
            columns = torch.arange(self._seen, self._seen + new, device=keys.device)
            keys = self.observed.rotary.strip(keys, columns.expand(len(counts), -1))
        for store, states in ((self.key_store, keys), (self.value_store, values)):
            stored = store.side.transform.store(states)
            mine = slots if store is self.key_store else None
            store.append(left_aligned(stored, valid, counts), bits_of, mine)
            window = store.side.window
            if new > 1 or not self._seen or window is None or window.counts_current:
                store.flush()

    def _track(self, new: int) -> bool:
        """Slots order a prompt's own tokens; sliding windows and RoPE on read need them always."""
        return self._keeps_slots or (new > 1 and self.protocol == "quantized_prefill")

    def _new_slots(self, valid: Tensor, counts: Lengths) -> Ragged:
        end = self._seen + valid.shape[1]
        columns = torch.arange(self._seen, end, dtype=torch.int32, device=valid.device)
        return left_aligned(columns.expand(valid.shape)[:, None], valid, counts)

    def _read(self) -> tuple[Ragged, Ragged]:
        """Stored keys and values, decoded, in the basis of attention: (B, H, T, D)."""
        sides = []
        for store in (self.key_store, self.value_store):
            rows = store.read(self.dtype)
            states = store.side.transform.read(rows.data)
            if store.side.pre_rope:
                states = self.observed.rotary.embed(states, store.slots().data[:, 0])
            sides.append(Ragged(states, rows.lengths))
        return sides[0], sides[1]

    def _attend_stored(
        self, query: Tensor, scaling: float, softcap: float | None, mask: Tensor | None = None
    ) -> Tensor:
        query = self.quantizer.key.transform.attend(query)
        out = None
        if self._fused(query):
            out = attend_fused(query, self.key_store, self.value_store, scaling, softcap)
        if out is None:
            out = self._attend_read(query, scaling, softcap, mask)
        reads = zip(self.packed_tokens_read, self.key_store.packed_lengths, strict=True)
        self.packed_tokens_read = [total + now for total, now in reads]
        return self.quantizer.value.transform.attend(out)

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
        keys, values = self._read()
        new = query.shape[2]
        if softcap is None and self._plainly_causal(new, keys.lengths, mask):
            # In the order of the queries, attention skips what lies ahead: half of the work.
            order = self.key_store.slots().data.argsort(2)[..., None]
            k, v = (torch.take_along_dim(side.data, order, 2) for side in (keys, values))
            return attend(query, k, v, None, scaling, causal=True)
        visible = self._visible(new, keys.lengths, keys.data.shape[2], mask)
        return attend(query, keys.data, values.data, visible, scaling, softcap)

    def _plainly_causal(self, new: int, lengths: Lengths, mask: Tensor | None) -> bool:
        """Whether this is a first prompt without padding, window or mask of the model's own."""
        window = self.spec.sliding_window
        return (
            mask is None
            and 1 < new == self._seen
            and set(lengths) == {new}
            and (window is None or window >= new)
        )

    def _visible(
        self, new: int, lengths: Lengths, width: int, mask: Tensor | None
    ) -> Tensor | None:
        """(B, 1, n, T) bool or None when every query sees every stored token.

        `mask` is the model's own, over columns; it rules in the first prompt, where it may be more
        than causal (prefix language models, images that see all of themselves).
        """
        ordered = self.key_store.recent.slots is not None or any(
            s.slots is not None for s in self.key_store.segments.values()
        )
        if not ordered and len(set(lengths)) == 1:
            return None
        if not ordered:
            return within(lengths, width, self.device)[:, None, None].expand(-1, -1, new, -1)
        slots = self.key_store.slots()
        if mask is not None and mask.dtype == torch.bool and mask.shape[-1] == self._seen == new:
            here = within(lengths, width, self.device)[:, None, None]
            columns = slots.data[:, :, None].clamp_min(0).long().expand(-1, -1, new, -1)
            return here & mask.expand(len(lengths), 1, -1, -1).gather(3, columns)
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
        sides = []
        new = (query.shape[2],) * query.shape[0]
        for side, old, states in zip(
            (self.quantizer.key, self.quantizer.value),
            before[:2],
            (step.keys, step.values),
            strict=True,
        ):
            # Exact states in the basis of the stored ones; RoPE is already on these keys.
            fresh = side.transform.read(side.transform.store(states))
            sides.append(join((old, Ragged(fresh, new))))
        visible = self._continued_mask(before[2], query.shape[2])
        key_side, value_side = self.quantizer.key.transform, self.quantizer.value.transform
        keys, values = sides[0].data, sides[1].data
        out = attend(key_side.attend(query), keys, values, visible, scaling, softcap)
        return value_side.attend(out)

    def _continued_mask(self, old: Ragged, new: int) -> Tensor:
        """Stored tokens by their slots, then this step's own, of which padding is never seen."""
        columns = torch.arange(self._seen - new, self._seen, dtype=torch.int32, device=self.device)
        columns = columns.expand(len(old.lengths), 1, new)
        valid = self.observed.valid
        if valid is not None and valid.shape == (len(old.lengths), new):
            never = torch.iinfo(torch.int32).max
            columns = columns.masked_fill(~valid.to(self.device)[:, None], never)
        return self._causal(join((old, Ragged(columns, (new,) * len(old.lengths)))), new)
