"""A packed cache of fixed size: filled with prompts, then read and grown by kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.cache.codecs import Affine
from kvbench.cache.contract import EXACT, LayerQuantizer, LayerSpec, Side, Transform
from kvbench.cache.quantized import BoundMethod
from kvbench.efficiency.schedule import Moves, Reach, ResidualKeys, SharedWindow
from kvbench.efficiency.support import unsupported
from kvbench.efficiency.workload import SideLayout, Workload, cache_layout
from kvbench.errors import UserError
from kvbench.kernels.append import append, scatter
from kvbench.kernels.attention import decode_attention
from kvbench.kernels.quantize import Rounding, quantize_into
from kvbench.kernels.states import PackedStates, Span, States


class StaticSide:
    """Keys or values of one layer: a store a precision, and one buffer of exact tokens.

    The exact buffer is (B, H, E + R, D): E tokens that stay exact for good, then the ring.
    """

    def __init__(
        self,
        side: Side,
        layout: SideLayout,
        spec: LayerSpec,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate for `rows` rows."""
        self.side, self.layout = side, layout
        shape = (rows, spec.num_kv_heads)
        self.packed = {
            bits: _allocate(_affine(side, bits), (*shape, room, spec.head_dim), device)
            for bits, room in layout.packed.items()
        }
        width = layout.exact + layout.ring
        self.exact = torch.empty(*shape, width, spec.head_dim, dtype=dtype, device=device)
        self._roundings = {bits: _affine(side, bits).rounding for bits in layout.packed}

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.exact.nbytes + sum(states.nbytes for states in self.packed.values())

    def append(self, states: Tensor, moves: Moves) -> None:
        """Take one token a row, (B, H, D) in the stored basis."""
        # Groups along tokens are packed as blocks, after attention.
        single = {bits: of for bits, of in self._roundings.items() if of.along == "channels"}
        stores: list[States] = [self.packed[bits] for bits in single]
        roundings: list[Rounding | None] = list(single.values())
        if self.layout.exact:
            stores.append(self.exact)
            roundings.append(None)
        ring = self.exact if self.layout.ring else None
        slot = moves.places if moves.slot is None else moves.slot
        append(states, ring, slot, stores, roundings, moves.leaving, moves.places)

    def pack_ring(self, counts: Tensor, places: Tensor) -> None:
        """Pack the first counts[b] tokens of the ring as a block."""
        ((bits, store),) = self.packed.items()
        quantize_into(self.exact, self._roundings[bits], store, counts=counts, destinations=places)

    def of(self, bits: int) -> States:
        """The store of a precision."""
        return self.exact if bits == EXACT else self.packed[bits]

    def fill(self, rows: slice, states: Tensor, leaving: int, moves: Moves | None) -> None:
        """Take the prompts of some rows, (b, H, n, D) in the stored basis.

        The first `leaving` tokens leave the window at once, where `moves` says (b, leaving), or all
        to the one store there is; the rest fill the ring.
        """
        left, newest = states[:, :, :leaving], states[:, :, leaving:]
        into = {bits: store[rows] for bits, store in self.packed.items()}
        if moves is None:
            for bits, store in into.items():
                quantize_into(left, self._roundings[bits], store)
        else:
            stores: list[States] = [*into.values(), self.exact[rows]]
            scatter(left, stores, [*self._roundings.values(), None], moves.leaving, moves.places)
        start = self.layout.exact
        self.exact[rows, :, start : start + newest.shape[2]].copy_(newest)

    @property
    def is_uniform(self) -> bool:
        """Whether all that leaves the window goes to one store."""
        return len(self.packed) == 1 and not self.layout.exact


class StaticLayer:
    """One layer: where its tokens go and what its queries read."""

    def __init__(self, key: StaticSide, value: StaticSide, spec: LayerSpec) -> None:
        """Two sides."""
        self.key, self.value, self.spec = key, value, spec

    @property
    def key_transform(self) -> Transform:
        """The basis of keys; that of values is folded into the weights."""
        return self.key.side.transform


class StaticCache:
    """All layers and the counters that they share."""

    def __init__(
        self,
        bound: BoundMethod,
        workload: Workload,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate.

        Raises:
            UserError: `unsupported` has something to say about the method.
        """
        layout = cache_layout(bound.quantizers, bound.specs, workload, dtype.itemsize)
        if reason := unsupported(bound, workload):
            raise UserError(f"{bound.method.label} can't use a static cache: {reason}.")
        rows = workload.batch
        self.layout, self.device = layout, device
        self.layers = [
            StaticLayer(
                StaticSide(quantizer.key, room.key, spec, rows, dtype, device),
                StaticSide(quantizer.value, room.value, spec, rows, dtype, device),
                spec,
            )
            for quantizer, room, spec in zip(
                bound.quantizers, layout.layers, bound.specs, strict=True
            )
        ]
        kind = SharedWindow if _shares_window(bound.quantizers[0]) else ResidualKeys
        self.schedule = kind(layout.layers, rows, device)
        self.packed_tokens_read = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(layer.key.nbytes + layer.value.nbytes for layer in self.layers)

    @property
    def tokens(self) -> Tensor:
        """(B,) int32, tokens of each row."""
        return self.schedule.tokens

    def fill(
        self, rows: slice, index: int, keys: Tensor, values: Tensor, bits: Tensor
    ) -> list[Span]:
        """Take one layer of the prompts of some rows; what their last tokens attend to.

        Keys and values are (b, H, n, D) in the stored basis, without padding; bits (b, n) int8, on
        the device.
        """
        layer, schedule, length = self.layers[index], self.schedule, bits.shape[1]
        sides = (layer.key, keys), (layer.value, values)
        leaving = [length - schedule.kept(side.side.window, length) for side, _ in sides]
        moves = None
        if isinstance(schedule, SharedWindow) and leaving[0] and not layer.key.is_uniform:
            moves = schedule.prompt_moves(index, bits[:, : leaving[0]])
        for (side, states), count in zip(sides, leaving, strict=True):
            side.fill(rows, states, count, moves)
        schedule.fill(rows, index, bits, *leaving)
        return [span[rows] for span in self.spans(index)]

    def check(self) -> None:
        """Hold the prompts against the room that was made for them; waits for the device.

        Raises:
            UserError: a row has more tokens of a precision than there is room for.
        """
        if isinstance(self.schedule, SharedWindow) and bool(self.schedule.crowded):
            raise UserError(
                "a prompt has more tokens of a precision than the static cache has room for: the "
                "plan depends on the data in a way that its rehearsal did not show."
            )

    def reset(self) -> None:
        """Forget all rows; the memory stays."""
        for tensor in (*self.schedule.state, self.packed_tokens_read):
            tensor.zero_()

    def begin(self) -> None:
        """Start a decode step."""
        self.schedule.begin()
        self.packed_tokens_read += self.schedule.packed_tokens()

    def append(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Take one token a row, (B, H, D) in the stored basis."""
        layer, (key, value) = self.layers[index], self.schedule.moves(index)
        layer.key.append(keys, key)
        layer.value.append(values, value)

    def attend(self, index: int, query: Tensor, scaling: float) -> Tensor:
        """(B, Hq, D), in the basis of the stored keys, to the outputs (B, Hq, D)."""
        return decode_attention(query, self.spans(index), scaling)

    def settle(self, index: int) -> None:
        """Pack what waits for the step to have attended."""
        if isinstance(self.schedule, ResidualKeys):
            self.layers[index].key.pack_ring(self.schedule.flush, self.schedule.keys)

    def end(self) -> None:
        """Count the step's tokens."""
        self.schedule.end()

    def spans(self, index: int) -> list[Span]:
        """What the newest token of every row attends to."""
        layer, schedule = self.layers[index], self.schedule
        key, value = layer.key, layer.value
        if isinstance(schedule, ResidualKeys):
            ((bits, keys),) = key.packed.items()
            sides: Sequence[tuple[States, States]] = (
                (keys, value.of(bits)),
                (keys, value.exact),
                (key.exact, value.exact),
            )
            return [_span(*pair, reach) for pair, reach in zip(sides, schedule.spans, strict=True)]
        precisions = [*key.packed, *([EXACT] if key.exact.shape[2] else [])]
        return [
            _span(key.of(bits), value.of(bits), schedule.reach(index, bits)) for bits in precisions
        ]


def _shares_window(quantizer: LayerQuantizer) -> bool:
    return quantizer.key.window == quantizer.value.window


def _affine(side: Side, bits: int) -> Affine:
    codec = side.codecs[bits]
    if not isinstance(codec, Affine):
        raise TypeError(f"{codec} is no Affine codec")
    return codec


def _allocate(
    codec: Affine, shape: tuple[int, int, int, int], device: torch.device
) -> PackedStates:
    """Room for (B, H, N, D) states."""
    *outer, tokens, channels = shape
    group = codec.group if isinstance(codec.group, int) else channels
    along_tokens = codec.along == "tokens"
    meta = (
        (*outer, tokens // group, channels) if along_tokens else (*outer, tokens, channels // group)
    )
    kinds = {"int": torch.int16, "float": torch.float16, "symmetric": None}
    zero = kinds[codec.zero]
    return PackedStates(
        torch.empty(*outer, tokens, channels * codec.bits // 8, dtype=torch.uint8, device=device),
        torch.empty(meta, dtype=torch.float16, device=device),
        None if zero is None else torch.empty(meta, dtype=zero, device=device),
        codec.bits,
        group,
        codec.along,
    )


def _span(keys: States, values: States, reach: Reach) -> Span:
    return Span(keys, values, reach.lengths, reach.key_starts, reach.value_starts)
