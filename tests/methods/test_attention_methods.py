"""MiKV, ZipCache, ZipVL and KVCrush step by step, written out again in numpy float64.

What they store depends on the attention so far, so the references are fed like a cache is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kvbench.cache import LayerSpec
from kvbench.errors import UserError
from kvbench.registry import METHODS
from tests.methods.stepwise import HEADS, KV_HEADS, PROTOCOLS, WIDTH, Array, made

GROUPS = HEADS // KV_HEADS


def half(x: Any) -> Array:
    return np.asarray(x, dtype=np.float16).astype(np.float64)


def grid(x: Array, bits: int, axes: tuple[int, ...] | int) -> Array:
    """F1: x as a code between the float16 minimum and maximum over `axes`."""
    single, levels = x.astype(np.float32), np.float32(2**bits - 1)
    low, high = single.min(axes, keepdims=True), single.max(axes, keepdims=True)
    scale, low = (half(x).astype(np.float32) for x in ((high - low) / levels, low))
    codes = np.clip(np.rint((single - low) / scale), 0, levels)
    return np.asarray(codes * scale + low, dtype=np.float64)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def drawn(query: Array, keys: Array, here: Array | None = None) -> Array:
    """(H, t): what one query (Hq, D) gives to each token, summed over the heads of a group."""
    scores = np.einsum("hgd,htd->hgt", query.reshape(KV_HEADS, GROUPS, -1), keys) / np.sqrt(WIDTH)
    if here is not None:
        scores = np.where(here[:, None], scores, -np.inf)
    return np.asarray(softmax(scores).sum(1))


def mass_of(queries: Array, keys: Array, rows: Any) -> Array:
    """(H, T) over causal queries."""
    mass = np.zeros(keys.shape[:2])
    for row in rows:
        mass[:, : row + 1] += drawn(queries[:, row], keys[:, : row + 1])
    return mass


def probes(length: int, newest: int, others: int, repeats: bool) -> list[int]:
    early, source = max(length - newest, 0), torch.Generator().manual_seed(0)
    if repeats and early:
        chosen = torch.randint(early, (others,), generator=source)
    else:
        chosen = torch.randperm(early, generator=source)[:others]
    return [*chosen.tolist(), *range(early, length)]


class Reference:
    """What is stored: (H, t, D) keys and values as read, and (H, t) which of them are there."""

    fields: ClassVar[dict[str, Any]] = {}

    def start(self, query: Array, keys: Array, values: Array) -> None:
        self.keys, self.values = keys.copy(), values.copy()
        self.here = np.ones(keys.shape[:2], dtype=bool)

    def grow(self, keys: Array, values: Array) -> None:
        self.keys = np.concatenate((self.keys, keys), 1)
        self.values = np.concatenate((self.values, values), 1)
        self.here = np.concatenate((self.here, np.ones((KV_HEADS, 1), dtype=bool)), 1)

    def after(self, query: Array) -> None:
        """What the step's query (Hq, D) leaves behind."""


class MiKV(Reference):
    spec = "mikv[ratio=0.3]"
    high: int | None = None

    def start(self, query: Array, keys: Array, values: Array) -> None:
        super().start(query, keys, values)
        asked = np.abs(query).reshape(KV_HEADS, GROUPS, -1, WIDTH).max((1, 2))
        balance = np.sqrt(asked / np.abs(keys).max(1))  # eq. 2
        self.factor = half(1 / balance)[:, None]
        self.scores = mass_of(query, keys, range(keys.shape[1]))
        self.important = np.ones(keys.shape[:2], dtype=bool)
        self._enter(slice(None))
        self._demote()

    def grow(self, keys: Array, values: Array) -> None:
        super().grow(keys, values)
        more = np.ones((KV_HEADS, 1))
        self.important = np.concatenate((self.important, more.astype(bool)), 1)
        self.scores = np.concatenate((self.scores, 0 * more), 1)
        self._enter(slice(-1, None))

    def after(self, query: Array) -> None:
        self.scores += drawn(query, self.keys)
        self._demote()

    def _enter(self, new: slice) -> None:
        if self.high:
            self._encode(np.ones_like(self.important[:, new]), new, self.high)

    def _demote(self) -> None:
        length = self.keys.shape[1]
        kept = int(0.3 * length)
        heavy = kept // 2
        for head in range(KV_HEADS):
            old = [t for t in np.flatnonzero(self.important[head]) if t < length - (kept - heavy)]
            best = sorted(old, key=lambda t: -self.scores[head, t])[:heavy]
            gone = [t for t in old if t not in best]
            self.important[head, gone] = False
            mask = np.zeros((KV_HEADS, length), dtype=bool)
            mask[head, gone] = True
            self._encode(mask, slice(None), 2)

    def _encode(self, mask: Array, part: slice, bits: int) -> None:
        for states, factor in ((self.keys, self.factor), (self.values, 1.0)):
            view = (states / factor)[:, part].astype(np.float32)  # what was packed is float32
            groups = view.reshape(*view.shape[:2], 2, WIDTH // 2)  # half a head
            packed = grid(groups, bits, -1).reshape(view.shape) * factor
            states[:, part] = np.where(mask[..., None], packed, states[:, part])


class MiKV8(MiKV):
    spec = "mikv[ratio=0.3,high_bits=8]"
    high = 8


class Zip(Reference):
    """ZipCache's storage; subclasses say which tokens are important, (H, n) bool."""

    merged = False

    def start(self, query: Array, keys: Array, values: Array) -> None:
        super().start(query, keys, values)
        self.separate = half(np.sqrt(np.abs(values).max(1, keepdims=True)))
        self.packed = keys.shape[1]
        self._pack(0, self.packed, self.salient(query, keys))

    def after(self, query: Array) -> None:
        length = self.keys.shape[1]
        if length - self.packed == 8:
            mass = drawn(query, self.keys, self.here)[:, self.packed :]
            self._pack(self.packed, length, self.again(mass))
            self.packed = length

    def _pack(self, start: int, end: int, important: Array) -> None:
        scaled = self.values / self.separate
        for bits, chosen in ((4, important), (2, ~important)):
            for head in range(KV_HEADS):
                t = start + np.flatnonzero(chosen[head])
                if not len(t):
                    continue
                self.keys[head, t] = grid(self.keys[head, t], bits, 0)
                # A range a token, over a head or over all of them.
                flat = scaled[:, t] if self.merged else scaled[head : head + 1, t]
                back = grid(flat.transpose(1, 0, 2), bits, (1, 2)).transpose(1, 0, 2)
                mine = back[head if self.merged else 0]
                self.values[head, t] = mine * self.separate[head]

    def salient(self, query: Array, keys: Array) -> Array:
        raise NotImplementedError

    def again(self, mass: Array) -> Array:
        raise NotImplementedError


class ZipCache(Zip):
    spec = "zipcache[stream=8,probes=0.1]"
    shipped = False

    def salient(self, query: Array, keys: Array) -> Array:
        length = keys.shape[1]
        share = max(int(0.1 * length), 1)
        rows = probes(length, share, share, repeats=True)
        mass = mass_of(query, keys, rows)
        chances = [sum(row >= place for row in rows) for place in range(length)]
        if self.shipped:
            chances = [length - place for place in range(length)]
        return self.again(mass / np.maximum(chances, 1))

    def again(self, mass: Array) -> Array:
        if self.merged:
            mass = mass.sum(0, keepdims=True).repeat(KV_HEADS, 0)
        count = int(0.4 * mass.shape[1])
        important = np.ones(mass.shape, dtype=bool)
        for head, order in enumerate(np.argsort(mass, 1, kind="stable")[:, :count]):
            important[head, order] = False
        return important


class ZipCacheShipped(ZipCache):
    spec = "zipcache[stream=8,probes=0.1,as_shipped=true]"
    shipped = True


class ZipCacheLayer(ZipCache):
    spec = "zipcache[stream=8,probes=0.1,per_head=false]"
    merged = True


class ZipVL(Zip):
    spec = "zipvl[stream=8,tau=0.7,recent_probes=6,random_probes=5]"
    merged = True

    def salient(self, query: Array, keys: Array) -> Array:
        length = keys.shape[1]
        rows = probes(length, 6, 5, repeats=False)
        mass = mass_of(query, keys, rows).sum(0)
        chances = [sum(row >= place for row in rows) for place in range(length)]
        important = self._most(mass, mass / np.maximum(chances, 1))
        important[:, -1] = True
        return important

    def again(self, mass: Array) -> Array:
        return self._most(mass.sum(0), mass.sum(0))

    def _most(self, mass: Array, score: Array) -> Array:
        count = next(
            p for p in range(1, len(mass) + 1) if np.sort(mass)[::-1][:p].sum() >= 0.7 * mass.sum()
        )
        important = np.zeros((KV_HEADS, len(mass)), dtype=bool)
        important[:, np.argsort(-score, kind="stable")[:count]] = True
        return important


class ZipVLDrop(ZipVL):
    spec = ZipVL.spec.replace("]", ",drop=true]")

    def _pack(self, start: int, end: int, important: Array) -> None:
        super()._pack(start, end, important)
        self.here[:, start:end] = important


class Crush(Reference):
    spec = "kvcrush[start=2,recent=5,keep=0.5,window=4,anchor=alternate,representatives=0.5]"

    def start(self, query: Array, keys: Array, values: Array) -> None:
        super().start(query, keys, values)
        self.here = np.tile(self.kept(query, keys), (KV_HEADS, 1))

    def kept(self, query: Array, keys: Array) -> Array:
        length = keys.shape[1]
        stays = np.zeros(length, dtype=bool)
        stays[:2] = True
        stays[max(length - 5, 2) :] = True
        middle = list(range(2, max(length - 5, 2)))
        room = max(int(0.5 * length) - int(stays.sum()), 0)
        mass = mass_of(query, keys, range(max(length - 4, 0), length))
        score = {t: mass[:, t].sum() for t in middle}
        important = sorted(middle, key=lambda t: -score[t])[: room - room // 2]
        bits = {
            t: [sum(mass[h, middle] > mass[h, t]) < len(middle) // 2 for h in range(KV_HEADS)]
            for t in middle
        }
        others = [t for t in middle if t not in important]
        distance = {t: int(bits[t][0] != 0) + int(bits[t][1] != 1) for t in others}
        order, wanted = sorted(others, key=lambda t: distance[t]), room // 2
        if wanted >= len(others):
            chosen = others
        else:
            chosen = [order[i * (len(order) // wanted)] for i in range(wanted)]
        stays[important + chosen] = True
        return stays


class CrushRTN(Crush):
    spec = Crush.spec.replace("[", "[base=rtn_int4[group_size=8,zero=float],")

    def start(self, query: Array, keys: Array, values: Array) -> None:
        super().start(query, keys, values)
        self.keys, self.values = self._packed(keys), self._packed(values)

    def grow(self, keys: Array, values: Array) -> None:
        super().grow(self._packed(keys), self._packed(values))

    def _packed(self, x: Array) -> Array:
        return grid(x.reshape(*x.shape[:2], 2, 8), 4, -1).reshape(x.shape)


REFERENCES = [
    MiKV, MiKV8, ZipCache, ZipCacheShipped, ZipCacheLayer, ZipVL, ZipVLDrop, Crush, CrushRTN,
]  # fmt: skip


def attended(query: Array, keys: Array, values: Array, here: Array) -> Array:
    """(Hq, D)."""
    out = np.empty_like(query)
    for head in range(HEADS):
        kv, mine = head // GROUPS, here[head // GROUPS]
        weights = softmax(keys[kv, mine] @ query[head] / np.sqrt(WIDTH))
        out[head] = weights @ values[kv, mine]
    return out


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("prompt", [1, 7, 41])
@pytest.mark.parametrize("kind", REFERENCES)
def test_every_step_attends_to_what_the_method_says(
    driver: Any, random_states: Any, kind: Any, prompt: int, protocol: str
) -> None:
    total = prompt + 21
    states = [x.double() for x in random_states(total, seed=prompt)]
    query, keys, values = (x[0].numpy() for x in states)
    reference = kind()
    drive = driver(made(kind.spec), LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH), protocol)
    for start, end in zip([0, *range(prompt, total)], range(prompt, total + 1), strict=False):
        out = drive.step(*(x[:, :, start:end] for x in states))[0].numpy()
        if start:
            reference.grow(keys[:, start:end], values[:, start:end])
        else:
            reference.start(query[:, :end], keys[:, :end], values[:, :end])
        for place in range(start, end):
            stored = reference.keys, reference.values, reference.here
            if protocol == "exact_prefill" and place < end - 1:
                stored = keys, values, np.ones((KV_HEADS, total), dtype=bool)
            seen = [x[:, : place + 1] for x in stored]
            if seen[2].any(1).all():  # else the query sees nothing: left open
                expected = attended(query[:, place], *seen)
                np.testing.assert_allclose(out[:, place - start], expected, atol=3e-6, rtol=1e-5)
        if start:
            reference.after(query[:, start])


def test_zipvl_keeps_attention_sparse_in_the_prompt(driver: Any, random_states: Any) -> None:
    states = [x.double() for x in random_states(41, seed=2)]
    query, keys, values = (x[0].numpy() for x in states)
    drive = driver(made(ZipVL.spec), LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH), "sparse_prefill")
    out = drive.step(*states)[0].numpy()
    reference = ZipVL()
    important = reference.salient(query, keys)
    assert 1 < important[0].sum() < 41
    for place in range(40):
        expected = np.zeros((HEADS, WIDTH))
        if important[0, place]:
            seen = important[:, : place + 1]
            expected = attended(query[:, place], keys[:, : place + 1], values[:, : place + 1], seen)
        np.testing.assert_allclose(out[:, place], expected, atol=1e-9)
    reference.start(query, keys, values)
    expected = attended(query[:, 40], reference.keys, reference.values, reference.here)
    np.testing.assert_allclose(out[:, 40], expected, atol=3e-6, rtol=1e-5)


def test_the_balancer_is_one_where_a_channel_is_dead(driver: Any, random_states: Any) -> None:
    query, keys, values = (x.double() for x in random_states(30))
    query[..., 3], keys[..., 5] = 0, 0
    drive = driver(METHODS.get("mikv"), LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH), "exact_prefill")
    assert bool(drive.step(query, keys, values).isfinite().all())
    scale: Any = drive.layer.key_store.transform
    ones = scale.attend(torch.ones(1, HEADS, 1, WIDTH, dtype=torch.float64))
    assert bool((ones[..., [3, 5]] == 1).all())
    assert not bool((ones == 1).all())


def test_a_method_without_sparse_prefill_says_so(tiny_text_model: Any) -> None:
    from kvbench.cache import bind

    model = tiny_text_model().model
    with pytest.raises(UserError, match="sparse prefill"):
        bind(model, "kivi", protocol="sparse_prefill")
    bind(model, "fp16", protocol="sparse_prefill")  # nothing is unimportant
