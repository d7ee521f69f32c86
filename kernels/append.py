"""Put tokens into one side of a cache, each into the store of its precision.

A decode step appends one token a row and stores the one that leaves its ring; a prompt has many.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvbench.kernels.launch import use_triton, where_it_is
from kvbench.kernels.quantize import quantize
from kvbench.kernels.rounding import Rounding
from kvbench.kernels.states import States

EXACT = 16
"""Bits of a token that moves to an exact store."""


def unsupported(head_dim: int, roundings: Sequence[Rounding | None]) -> str | None:
    """Why the kernel can't serve stores of such roundings, in a sentence, or None if it can.

    Exact stores (None) of any size are taken. `append` is plain torch where this gives a reason,
    but for groups along tokens and float8 metadata, which no store of its kind can hold.
    """
    for rounding in roundings:
        if rounding is None:
            continue
        if rounding.along == "tokens":
            return "a token can't be appended to groups along tokens."
        if rounding.float8:
            return "appending to groups with float8 metadata has no kernel."
        if head_dim & (head_dim - 1) or rounding.group & (rounding.group - 1):
            return (
                f"appending to groups of {rounding.group} of {head_dim} channels has no kernel: "
                "not powers of two."
            )
    return None


def append(
    states: Tensor,
    ring: Tensor | None,
    slot: Tensor,
    evicted: Sequence[States],
    roundings: Sequence[Rounding | None],
    bits: Tensor,
    places: Tensor,
) -> None:
    """Append one token a row to one side, in place; one launch on CUDA.

    states (B, H, D), in the stored basis, go to ring[b, :, slot[b]] of the exact (B, H, N, D) ring.
    The token that stood there moves first to place places[b] of the store whose precision is
    bits[b], nowhere if none has it (0): rounded as `roundings` says to packed states, copied to an
    exact (B, H, N', D) tensor (16 bits, rounding None), which may be the ring itself. Without a
    ring the new token is stored so at once, and `slot` is not read. slot, bits and places are (B,)
    int32.
    """
    if use_triton(states) and unsupported(states.shape[-1], roundings) is None:
        from kvbench.kernels import append_triton as kernels

        return kernels.append(states, ring, slot, evicted, roundings, bits, places)
    rows = torch.arange(states.shape[0], device=states.device)
    leaving = states if ring is None else ring[rows, :, slot.long()]
    for store, rounding in zip(evicted, roundings, strict=True):
        if isinstance(store, Tensor):
            _write(store, leaving, places, bits == EXACT)
        elif rounding is not None:
            packed = quantize(leaving[:, :, None], rounding)
            for to, new in zip(store.tensors, packed.tensors, strict=True):
                _write(to, new[:, :, 0], places, bits == store.bits)
    if ring is not None:
        ring[rows, :, slot.long()] = states
    return None


def scatter(
    states: Tensor,
    stores: Sequence[States],
    roundings: Sequence[Rounding | None],
    bits: Tensor,
    places: Tensor,
) -> None:
    """Store tokens of one side in place; one launch on CUDA.

    Token t of row b of states (B, H, n, D), in the stored basis and at any strides, goes to place
    places[b, t] of the store whose precision is bits[b, t], nowhere if none has it (0): see
    `append`. bits and places are (B, n) int32; no two tokens of a row go to one place.
    """
    if use_triton(states) and unsupported(states.shape[-1], roundings) is None:
        from kvbench.kernels import append_triton as kernels

        with where_it_is(states):
            return kernels.scatter(states, stores, roundings, bits, places)
    for store, rounding in zip(stores, roundings, strict=True):
        if isinstance(store, Tensor):
            parts, wanted = [(store, states)], EXACT
        else:
            assert rounding is not None
            packed = quantize(states, rounding)
            parts = list(zip(store.tensors, packed.tensors, strict=True))
            wanted = store.bits
        row, token = (bits == wanted).nonzero(as_tuple=True)
        for to, new in parts:
            to[row, :, places[row, token].long()] = new[row, :, token]
    return None


def _write(store: Tensor, states: Tensor, places: Tensor, chosen: Tensor) -> None:
    """Put (B, H, C) states at (B, H, N, C) store[b, :, places[b]] in rows that are `chosen`."""
    if not store.shape[2]:
        return
    rows = torch.arange(store.shape[0], device=store.device)
    index = rows, slice(None), places.long().where(chosen, 0)
    # Rows that are not chosen get back what they hold: to pick rows would wait for the device.
    store[index] = states.where(chosen[:, None, None], store[index])
