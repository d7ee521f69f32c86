"""A token appended to a side: the one that leaves is stored as Affine encodes it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kvbench.cache.codecs import Affine
from kvbench.kernels import append as reference
from kvbench.kernels import append_triton as kernels
from kvbench.kernels.rounding import Rounding
from kvbench.kernels.states import PackedStates, States

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_CUDA)]
UNTOUCHED = 77
"""Fills stores and gaps: a token's write beside its place shows."""
TWO = Rounding(2, 64, "channels", "int")
FOUR = Rounding(4, 32, "channels", "float", clip=0.9, clip_mode="midpoint")
EIGHT = Rounding(8, 16, "channels", "symmetric", clip=0.95)
ONE = Rounding(1, 32, "channels", "float", clip=0.8)
Append = Callable[..., None]
append_functions = pytest.mark.parametrize("append", [reference.append, kernels.append])


@dataclass(frozen=True)
class Step:
    """What one call gets."""

    states: Tensor
    ring: Tensor
    slot: Tensor
    bits: Tensor
    places: Tensor


def gapped(*shape: int, dtype: torch.dtype) -> Tensor:
    """A view, of tensors with rows, heads, tokens and numbers to spare, filled with UNTOUCHED."""
    rows, heads, tokens, numbers = shape
    whole = torch.full((rows + 1, heads + 1, tokens + 1, numbers + 16), UNTOUCHED, device=DEVICE)
    return whole.to(dtype)[1:, 1:, 1:, :numbers]


def random_step(rows: int, heads: int, size: int, dtype: torch.dtype, bits: list[int]) -> Step:
    """One row for each of `bits` and more, rings of five tokens behind three exact ones."""
    states = torch.randn(rows, 3 * heads, size, device=DEVICE).to(dtype)[:, heads : 2 * heads]
    ring = gapped(rows, heads, 8, size, dtype=dtype)
    ring.copy_(torch.randn(ring.shape) * torch.rand(rows, heads, 1, 1).exp())
    ring[0, 0] = 0.25  # a group without a range
    order = torch.tensor((bits * rows)[:rows], dtype=torch.int32)
    numbers = torch.stack((torch.randint(3, 8, (rows,)), order, torch.randint(0, 3, (rows,))))
    slot, wanted, places = torch.cat((numbers, numbers), 1).int().to(DEVICE)[:, rows:]
    places[wanted == 0] = -1000
    return Step(states, ring, slot, wanted, places)


def packed_store(rows: int, heads: int, tokens: int, size: int, rounding: Rounding) -> PackedStates:
    """A store with gaps between its tokens."""
    zero = {"int": torch.int16, "float": torch.float16, "symmetric": None}[rounding.zero]
    meta = rows, heads, tokens, size // rounding.group
    return PackedStates(
        gapped(rows, heads, tokens, size * rounding.bits // 8, dtype=torch.uint8),
        gapped(*meta, dtype=torch.float16),
        None if zero is None else gapped(*meta, dtype=zero),
        rounding.bits,
        rounding.group,
    )


def check_store(store: PackedStates, rounding: Rounding, old: Tensor, step: Step) -> None:
    """Row by row: the token as Affine encodes it in its place, and nothing elsewhere."""
    check_tokens(store, rounding, old, step.bits, step.places)
    for tensor in store.tensors:
        assert (whole(tensor) == UNTOUCHED).all()


def check_tokens(
    store: PackedStates, rounding: Rounding, states: Tensor, bits: Tensor, places: Tensor
) -> None:
    """A token of each row (B, H, D) is in its place as Affine encodes it; there it is wiped out."""
    codec = Affine(
        rounding.bits,
        rounding.group,
        zero=rounding.zero,
        clip=rounding.clip,
        clip_mode=rounding.clip_mode,
    )
    for row, precision in enumerate(bits.tolist()):
        if precision == store.bits:
            place = int(places[row])
            encoded = codec.encode(states[row, None, :, None].cpu())
            for tensor, expected in zip(store.tensors, encoded, strict=True):
                assert torch.equal(tensor[row, :, place].cpu(), expected[0, :, 0])
                tensor[row, :, place] = UNTOUCHED


def whole(view: Tensor) -> Tensor:
    """All that `gapped` allocated."""
    return view.new_empty(0).set_(view.untyped_storage())


@append_functions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "size", "roundings"),
    [
        (3, 64, (TWO, FOUR, None)),
        (4, 128, (None, replace(TWO, group=128, zero="float"))),
        (1, 256, (EIGHT, ONE)),
        (20, 64, (replace(FOUR, clip_mode="scale", zero="int"),)),
        (2, 80, (None,)),
    ],
)
def test_the_oldest_token_moves_to_its_store(
    append: Append, dtype: torch.dtype, heads: int, size: int, roundings: tuple[Rounding | None]
) -> None:
    torch.manual_seed(size + heads)
    precisions = [0, *(16 if rounding is None else rounding.bits for rounding in roundings)]
    step = random_step(7, heads, size, dtype, precisions)
    before = step.ring.clone()
    old = before[torch.arange(7), :, step.slot.long()]
    stores: list[States] = [
        step.ring if rounding is None else packed_store(7, heads, 3, size, rounding)
        for rounding in roundings
    ]
    append(step.states, step.ring, step.slot, stores, roundings, step.bits, step.places)
    for row, (slot, bits, place) in enumerate(zip(step.slot, step.bits, step.places, strict=True)):
        before[row, :, slot] = step.states[row]
        if bits == 16:
            before[row, :, place] = old[row]
    assert torch.equal(step.ring, before)
    step.ring.fill_(UNTOUCHED)
    assert (whole(step.ring) == UNTOUCHED).all()
    for store, rounding in zip(stores, roundings, strict=True):
        if rounding is not None:
            check_store(store, rounding, old, step)


@append_functions
def test_without_a_ring_the_new_token_is_stored(append: Append) -> None:
    torch.manual_seed(0)
    step = random_step(6, 3, 64, torch.float16, [2, 4, 0])
    stores = [packed_store(6, 3, 3, 64, rounding) for rounding in (TWO, FOUR)]
    append(step.states, None, step.slot, stores, (TWO, FOUR), step.bits, step.places)
    check_store(stores[0], TWO, step.states, step)
    check_store(stores[1], FOUR, step.states, step)


@append_functions
def test_a_ring_alone_only_takes_the_token(append: Append) -> None:
    torch.manual_seed(0)
    step = random_step(4, 2, 32, torch.float16, [0])
    before = step.ring.clone()
    append(step.states, step.ring, step.slot, (), (), step.bits, step.places)
    before[torch.arange(4), :, step.slot.long()] = step.states
    assert torch.equal(step.ring, before)


@append_functions
def test_what_nothing_wrote_is_not_read(append: Append) -> None:
    step = random_step(3, 2, 64, torch.float16, [0])
    step.ring.fill_(torch.nan)
    store = packed_store(3, 2, 3, 64, TWO)
    append(step.states, step.ring, step.slot, [store], [TWO], step.bits, step.places)
    check_store(store, TWO, step.states, step)
    rows = torch.arange(3)
    assert torch.equal(step.ring[rows, :, step.slot.long()], step.states)


def test_a_store_without_tokens_may_stand_idle() -> None:
    step = random_step(3, 2, 64, torch.float16, [0])
    store = packed_store(3, 2, 0, 64, TWO)
    reference.append(step.states, step.ring, step.slot, [store], [TWO], step.bits, step.places)


def test_what_the_kernel_cannot_take_is_said() -> None:
    assert reference.unsupported(64, (TWO, FOUR, None)) is None
    assert reference.unsupported(80, (None,)) is None
    assert "32 of 96" in str(reference.unsupported(96, (None, FOUR)))
    assert "float8" in str(reference.unsupported(64, (replace(FOUR, float8=True),)))
    assert "along tokens" in str(reference.unsupported(64, (replace(TWO, along="tokens"),)))


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_a_graph_replays_an_append() -> None:
    torch.manual_seed(0)
    step = random_step(7, 8, 128, torch.float16, [2, 0, 4, 16])
    roundings = TWO, FOUR, None
    first, second = (
        (step.ring.clone(), packed_store(7, 8, 3, 128, TWO), packed_store(7, 8, 3, 128, FOUR))
        for _ in range(2)
    )
    at = torch.stack((step.slot, step.bits, step.places))

    def run(ring: Tensor, two: PackedStates, four: PackedStates) -> None:
        stores = two, four, ring
        reference.append(step.states, ring, at[0], stores, roundings, at[1], at[2])

    run(*(step.ring.clone(), packed_store(7, 8, 3, 128, TWO), packed_store(7, 8, 3, 128, FOUR)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*first)
    for turn in range(3):
        at[0].copy_(3 + (step.slot + turn) % 5)
        at[1].copy_(step.bits.roll(turn))
        at[2].copy_(torch.full_like(step.places, turn))
        step.states.normal_()
        graph.replay()
        run(*second)
    assert torch.equal(first[0], second[0])
    for ours, eager in zip(first[1:], second[1:], strict=True):
        assert torch.equal(ours.codes, eager.codes)
        assert torch.equal(ours.scale, eager.scale)


@pytest.mark.parametrize("scatter", [reference.scatter, kernels.scatter])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_of_a_prompt_goes_to_its_store(
    scatter: Callable[..., None], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, heads, tokens, size = 3, 5, 7, 64
    # As a projection gives them: a row's tokens lie behind one another, heads side by side.
    states = torch.randn(rows, tokens, heads, size, device=DEVICE).to(dtype).transpose(1, 2)
    bits = torch.randint(0, 4, (rows, tokens), device=DEVICE)
    bits = torch.tensor([0, 2, 4, 16], dtype=torch.int32, device=DEVICE)[bits]
    places = torch.stack([torch.randperm(tokens) for _ in range(rows)]).int().to(DEVICE)
    places[bits == 0] = -1000
    exact = gapped(rows, heads, tokens, size, dtype=dtype)
    stores = [packed_store(rows, heads, tokens, size, rounding) for rounding in (TWO, FOUR)]
    scatter(states, [*stores, exact], (TWO, FOUR, None), bits, places)
    for row, token in (bits == 16).nonzero().tolist():
        place = int(places[row, token])
        assert torch.equal(exact[row, :, place], states[row, :, token])
        exact[row, :, place] = UNTOUCHED
    assert (whole(exact) == UNTOUCHED).all()
    for token in range(tokens):  # token by token: what is right is emptied, so nothing may be left
        here = [x[:, token].contiguous() for x in (bits, places)]
        for store, rounding in zip(stores, (TWO, FOUR), strict=True):
            check_tokens(store, rounding, states[:, :, token], *here)
    for store in stores:
        for tensor in store.tensors:
            assert (whole(tensor) == UNTOUCHED).all()
