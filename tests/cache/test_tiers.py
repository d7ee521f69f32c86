"""What tiers, windows and plans can say, on one layer, against attention written out in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.cache import (
    DEFERRED,
    EVICTED,
    EXACT,
    Affine,
    HeavyHitters,
    LayerQuantizer,
    LayerSpec,
    Needs,
    PromptScale,
    SelfAttention,
    Side,
    Sliding,
    Tokens,
    Uniform,
    column_mass,
)
from kvbench.cache.layer import QuantizedLayer
from kvbench.cache.observers import Observed
from kvbench.cache.ragged import Ragged
from kvbench.cache.storage import Segment

HEADS, KV_HEADS, WIDTH, PROMPT, TOTAL = 4, 2, 8, 13, 21
SPEC = LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH)
PROTOCOLS = ("quantized_prefill", "exact_prefill")
Array = np.ndarray


@dataclass(frozen=True)
class Given:
    """A plan that answers what it is told; `later` are the tiers of generated tokens."""

    tiers: Tensor
    later: int = EXACT

    def prompt(self, tokens: Tokens) -> Tensor:
        return self.tiers

    def generated(self, tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.valid, self.later, dtype=torch.int8)


def states(rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    shape = lambda heads: (rows, heads, TOTAL, WIDTH)  # noqa: E731
    return tuple(  # type: ignore[return-value]
        torch.randn(shape(heads), dtype=torch.float64, generator=source)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


class Drive:
    """A layer fed with a prompt and then token by token."""

    def __init__(self, quantizer: LayerQuantizer, protocol: Any = "exact_prefill") -> None:
        self.observed = Observed(Needs(), False)
        self.layer = QuantizedLayer(quantizer, SPEC, protocol, self.observed)
        groups = HEADS // KV_HEADS
        self.module: Any = SimpleNamespace(
            num_key_value_groups=groups, is_causal=True, training=False
        )

    def step(self, *given: Tensor, valid: Tensor | None = None) -> Tensor:
        query, keys, values = given
        self.observed.valid = valid
        mask = None
        if valid is not None:
            n = query.shape[2]
            mask = torch.ones(n, n, dtype=torch.bool).tril()[None, None] & valid[:, None, None]
        stored, _ = self.layer.update(keys, values)
        return self.layer.attend(self.module, query, stored, mask, WIDTH**-0.5)

    def run(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        ends = [PROMPT, *range(PROMPT + 1, TOTAL + 1)]
        return [
            self.step(*(x[:, :, start:end] for x in given))
            for start, end in zip([0, *ends], ends, strict=False)
        ]


def weights(query: Array, keys: Array) -> Array:
    """(Hq, n, T) softmax of (Hq, n, D) on (H, T, D), everything visible."""
    keys = keys.repeat(HEADS // KV_HEADS, 0)
    scores = query @ keys.transpose(0, 2, 1) / np.sqrt(WIDTH)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def attended(query: Array, keys: Array, values: Array, seen: Array) -> Array:
    """(Hq, D) output of one query on tokens that (H, T) says are there."""
    out = np.empty((HEADS, WIDTH))
    for head in range(HEADS):
        kv = head // (HEADS // KV_HEADS)
        scores = keys[kv, seen[kv]] @ query[head] / np.sqrt(WIDTH)
        powers = np.exp(scores - scores.max())
        out[head] = powers @ values[kv, seen[kv]] / powers.sum()
    return out


def causal_mass(query: Array, keys: Array, rows: Any) -> Array:
    """(H, T) attention drawn from the queries `rows`, each seeing itself and what is before."""
    mass = np.zeros(keys.shape[:2])
    for row in rows:
        part = weights(query[:, row : row + 1], keys[:, : row + 1])[:, 0]
        mass[:, : row + 1] += part.reshape(KV_HEADS, -1, row + 1).sum(1)
    return mass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evicted_tokens_are_gone_and_counted(protocol: str) -> None:
    query, keys, values = given = states()
    tiers = torch.full((1, PROMPT), EXACT, dtype=torch.int8)
    tiers[0, [2, 3, 7]] = EVICTED
    drive = Drive(LayerQuantizer(Side(), Side(), Given(tiers), evicts=True), protocol)
    outs = drive.run(given)
    seen = np.ones((KV_HEADS, TOTAL), dtype=bool)
    seen[:, [2, 3, 7]] = False
    k, v = keys[0].numpy(), values[0].numpy()
    for step, out in enumerate(outs):
        end = PROMPT + step
        expected = attended(query[0, :, end - 1].numpy(), k[:, :end], v[:, :end], seen[:, :end])
        np.testing.assert_allclose(out[0, :, -1], expected, atol=1e-12)
    layer = drive.layer
    assert layer.key_store.lengths == (TOTAL - 3,)
    assert layer.elements == [2 * KV_HEADS * TOTAL * WIDTH]
    assert layer.nbytes == layer.row_nbytes(0) == 2 * KV_HEADS * (TOTAL - 3) * WIDTH * 8
    assert layer.packed_tokens_read == [3 * len(outs)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_heads_may_hold_tokens_of_their_own(protocol: str) -> None:
    query, keys, values = given = states(rows=2)
    tiers = torch.full((2, KV_HEADS, PROMPT), EXACT, dtype=torch.int8)
    tiers[:, 0, 1:5] = EVICTED
    tiers[:, 1, 4:6] = EVICTED
    tiers[1, 1, 8] = EVICTED
    quantizer = LayerQuantizer(Side(), Side(), Given(tiers), heads_apart=True, evicts=True)
    drive = Drive(quantizer, protocol)
    outs = drive.run(given)
    for row in range(2):
        seen = np.ones((KV_HEADS, TOTAL), dtype=bool)
        seen[:, :PROMPT] = tiers[row].numpy() == EXACT
        k, v = keys[row].numpy(), values[row].numpy()
        for step, out in enumerate(outs):
            end = PROMPT + step
            expected = attended(
                query[row, :, end - 1].numpy(), k[:, :end], v[:, :end], seen[:, :end]
            )
            np.testing.assert_allclose(out[row, :, -1], expected, atol=1e-12)
    # Rows follow their beams with all of their heads.
    drive.layer.reorder_cache(torch.tensor([1, 1]))
    assert drive.layer.key_store.lengths == (TOTAL - 4, TOTAL - 3) * 2


def test_the_attention_that_tokens_draw_is_counted_without_padding() -> None:
    query, keys, _ = (x[:, :, :PROMPT] for x in states(rows=2))
    valid = torch.ones(2, PROMPT, dtype=torch.bool)
    valid[1, :4] = False
    tokens = Tokens(valid, attention=SelfAttention(query, keys, WIDTH**-0.5))
    probes = torch.tensor([[3, 12, 12], [9, 5, 12]])
    everything, some = column_mass(tokens), column_mass(tokens, probes)
    for row, start in ((0, 0), (1, 4)):
        q, k = query[row, :, start:].numpy(), keys[row, :, start:].numpy()
        expected = causal_mass(q, k, range(PROMPT - start))
        np.testing.assert_allclose(everything[row, :, start:], expected, rtol=1e-5)
        expected = causal_mass(q, k, [int(probe) - start for probe in probes[row]])
        np.testing.assert_allclose(some[row, :, start:], expected, rtol=1e-5, atol=1e-7)
        assert float(everything[row, :, :start].abs().sum()) == 0


@pytest.mark.parametrize("block", [1, 5])
def test_blocks_of_queries_give_the_same_sums(monkeypatch: Any, block: int) -> None:
    query, keys, _ = (x[:, :, :PROMPT] for x in states())
    valid = torch.ones(1, PROMPT, dtype=torch.bool)
    tokens = Tokens(valid, attention=SelfAttention(query, keys, 0.3, softcap=2.0, sliding_window=6))
    whole = column_mass(tokens)
    monkeypatch.setattr("kvbench.cache.mass._LOGITS", block * HEADS * PROMPT)
    torch.testing.assert_close(column_mass(tokens), whole)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_heavy_hitters_and_the_newest_stay_and_none_comes_back(protocol: str) -> None:
    """Half of the tokens: the newest, and those with most accumulated attention, head by head."""
    _, keys, values = given = states(seed=3)
    codec = Affine(2, WIDTH, zero="float")
    side = Side({2: codec}, window=HeavyHitters(0.5))
    drive = Drive(LayerQuantizer(side, side, Uniform(2), heads_apart=True), protocol)
    q, k, v = (x[0].numpy() for x in given)
    stored = [codec.decode(codec.encode(x), torch.float64)[0].numpy() for x in (keys, values)]
    exact = np.ones((KV_HEADS, TOTAL), dtype=bool)
    scores = np.zeros((KV_HEADS, TOTAL))
    scores[:, :PROMPT] = causal_mass(q[:, :PROMPT], k[:, :PROMPT], range(PROMPT))

    def demote(length: int) -> None:
        kept = length // 2
        heavy = kept // 2
        for head in range(KV_HEADS):
            old = [t for t in np.flatnonzero(exact[head, :length]) if t < length - (kept - heavy)]
            best = sorted(old, key=lambda t: -scores[head, t])[:heavy]
            exact[head, [t for t in old if t not in best]] = False

    outs = drive.run(given)
    demote(PROMPT)
    for step, out in enumerate(outs):
        end = PROMPT + step
        now_k, now_v = (
            np.where(exact[:, :end, None], mine[:, :end], packed[:, :end])
            for mine, packed in zip((k, v), stored, strict=True)
        )
        everything = np.ones((KV_HEADS, end), dtype=bool)
        expected = attended(q[:, end - 1], now_k, now_v, everything)
        np.testing.assert_allclose(out[0, :, -1], expected, atol=1e-7)
        if step:
            drawn = weights(q[:, end - 1 : end], now_k)[:, 0].reshape(KV_HEADS, -1, end).sum(1)
            scores[:, :end] += drawn
            demote(end)
    assert drive.layer.key_store.recent.lengths == (TOTAL // 2,) * KV_HEADS
    waiting = KV_HEADS * (TOTAL // 2)
    packed = TOTAL - TOTAL // 2
    vectors = KV_HEADS * (packed * (WIDTH * 2 // 8 + 4) + TOTAL // 2 * WIDTH * 8)
    assert drive.layer.nbytes == 2 * (vectors + waiting) + 4 * waiting
    assert drive.layer.row_nbytes(0) == drive.layer.nbytes


@dataclass(frozen=True)
class Deferring:
    """Of tokens that leave, the one with most attention stays exact."""

    asked: list[Tensor] = field(default_factory=list)

    def prompt(self, tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.valid, EXACT, dtype=torch.int8)

    def generated(self, tokens: Tokens) -> Tensor:
        return torch.full_like(tokens.valid, DEFERRED, dtype=torch.int8)

    def settle(self, mass: Tensor, lengths: tuple[int, ...]) -> Tensor:
        self.asked.append(mass)
        best = mass.argmax(1, keepdim=True)
        return torch.full_like(mass, 2).scatter(1, best, EXACT).to(torch.int8)


def test_tiers_can_wait_for_the_attention_of_the_query_that_lets_tokens_go() -> None:
    query, keys, _ = given = states()
    side = Side(
        {2: Affine(2, WIDTH)}, window=Sliding(0, counts_current=False, flush_every=4, prompt=False)
    )
    plan = Deferring()
    drive = Drive(LayerQuantizer(side, side, plan))
    drive.run(given)
    assert drive.layer.key_store.segments[2].lengths == (6,)
    assert drive.layer.key_store.segments[EXACT].lengths == (PROMPT + 2,)
    end = PROMPT + 4
    drawn = weights(query[0, :, end - 1 : end].numpy(), keys[0, :, :end].numpy())[:, 0]
    np.testing.assert_allclose(plan.asked[0][0], drawn.sum(0)[PROMPT:end], rtol=1e-6)


def test_tokens_written_together_may_share_their_range() -> None:
    """Rows of unequal length, two writes: no padding and no other write enters a range."""
    codec = Affine(4, None, along="tokens", zero="float")
    source = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 2, 1, 7, WIDTH, generator=source) * 5
    segment = Segment(codec, 2)
    segment.append(Ragged(first, (7, 3)), None)
    segment.append(Ragged(second, (0, 5)), None)
    rows = segment.read(torch.float32)
    assert rows.lengths == (7, 8)
    parts = {0: [first[0, :, :7]], 1: [first[1, :, :3], second[1, :, :5]]}
    for row, written in parts.items():
        expected = [codec.decode(codec.encode(x[None]), torch.float32)[0] for x in written]
        assert torch.equal(rows.data[row, :, : rows.lengths[row]], torch.cat(expected, 1))
        metadata = len(written) * WIDTH * 4
        assert segment.row_nbytes(row) == rows.lengths[row] * WIDTH // 2 + metadata
    x = first[0, :, :7].numpy()
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    assert np.abs(rows.data[0, :, :7].numpy() - x).max() <= ((high - low) / 15 / 2).max() * 1.01
    segment.select(torch.tensor([1]))
    assert torch.equal(segment.read(torch.float32).data[0], rows.data[1])


def test_logits_of_a_tier_can_be_changed() -> None:
    query, keys, values = given = states()
    tiers = torch.full((1, PROMPT), EXACT, dtype=torch.int8)
    tiers[0, 3:9] = 8
    side = Side({8: Affine(8, WIDTH)})

    def lower(logits: Tensor, mine: Tensor) -> Tensor:
        return torch.where(mine, logits - 2, logits)

    drive = Drive(LayerQuantizer(side, side, Given(tiers), logit_maps={8: lower}))
    out = drive.run(given)[-1]
    q, k, v = query[0, :, -1].numpy(), keys[0].numpy(), values[0].numpy()
    for head in range(HEADS):
        scores = k[head // 2] @ q[head] / np.sqrt(WIDTH)
        scores[3:9] -= 2
        powers = np.exp(scores)
        expected = powers @ v[head // 2] / powers.sum()
        np.testing.assert_allclose(out[0, head, 0], expected, atol=3e-2)
    plain = Drive(LayerQuantizer(side, side, Given(tiers))).run(given)[-1]
    assert (plain - out).abs().max() > 0.1


def test_scales_are_measured_in_each_prompt_and_follow_their_rows() -> None:
    given = states(rows=2)
    scale = PromptScale(lambda x, tokens: x.abs().amax(2).sqrt())
    side = Side(transform=scale)
    drive = Drive(LayerQuantizer(side, side, Uniform(EXACT)))
    outs = drive.run(given)
    exact = Drive(LayerQuantizer(Side(), Side(), Uniform(EXACT))).run(given)
    for mine, expected in zip(outs, exact, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=1e-9)
    factor = given[1][:, :, :PROMPT].abs().amax(2).sqrt().half().double()
    stored = drive.layer.key_store.segments[EXACT].parts[0].data
    torch.testing.assert_close(stored, given[1] / factor[:, :, None])
    assert drive.layer.nbytes == 2 * 2 * KV_HEADS * (TOTAL * WIDTH * 8 + WIDTH * 2)
    drive.layer.reorder_cache(torch.tensor([1, 0, 1]))
    assert drive.layer.key_store.transform.row_nbytes() == KV_HEADS * WIDTH * 2
    assert drive.layer.read()[0].data.shape[0] == 3


def test_only_important_tokens_attend_in_a_sparse_prefill() -> None:
    query, keys, values = given = tuple(x[:, :, :PROMPT] for x in states(rows=2))
    tiers = torch.full((2, PROMPT), 8, dtype=torch.int8)
    tiers[0, [1, 2, 8]] = tiers[1, [5, 9, 10, 12]] = 4
    side = Side({8: Affine(8, WIDTH), 4: Affine(4, WIDTH)})
    quantizer = LayerQuantizer(side, side, Given(tiers), sparse_tiers=(4,))
    valid = torch.ones(2, PROMPT, dtype=torch.bool)
    valid[1, :3] = False
    out = Drive(quantizer, "sparse_prefill").step(*given, valid=valid)
    for row in range(2):
        attends = (tiers[row] == 8) & valid[row]
        attends[-1] = True
        for place in range(PROMPT - 1):
            if not valid[row, place]:
                continue
            seen = attends.numpy() & (np.arange(PROMPT) <= place)
            expected = np.zeros((HEADS, WIDTH))
            if attends[place]:
                q, k, v = query[row, :, place], keys[row], values[row]
                expected = attended(q.numpy(), k.numpy(), v.numpy(), np.stack([seen] * KV_HEADS))
            np.testing.assert_allclose(out[row, :, place], expected, atol=1e-12)


def test_tokens_after_a_short_prompt_are_the_rest_of_the_sinks() -> None:
    """Rows of 3 and 1 valid tokens, then two tokens at once, then single ones; 4 sinks a row."""
    side = Side({2: Affine(2, WIDTH, zero="float")})
    observed = Observed(Needs(), False)
    layer = QuantizedLayer(
        LayerQuantizer(side, side, Uniform(2, sinks=4)), SPEC, "quantized_prefill", observed
    )
    source = torch.Generator().manual_seed(0)
    module, taken = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False), []
    for new, exact in ((3, (3, 1)), (2, (4, 3)), (1, (4, 4)), (1, (4, 4))):
        states = torch.randn(2, KV_HEADS, new, WIDTH, generator=source)
        query = torch.randn(2, HEADS, new, WIDTH, generator=source)
        observed.valid = torch.ones(2, new, dtype=torch.bool)
        if not taken:
            observed.valid[1, :2] = False
        taken.append(states)
        stored, _ = layer.update(states, states)
        layer.attend(module, query, stored, None, WIDTH**-0.5)  # type: ignore[arg-type]
        assert layer.key_store.segments[EXACT].lengths == exact
    every = torch.cat(taken, 2)
    assert layer.key_store.packed_lengths == (3, 1)
    kept = layer.read()[0].data
    torch.testing.assert_close(kept[0, :, 3:7], every[0, :, :4])  # packed tokens are read first
    torch.testing.assert_close(kept[1, :, 1:5], every[1, :, 2:6])
