from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.kernels.attention import (
    MAX_SPLITS,
    _split_count,
    decode_attention,
    reference,
    split_counts,
    unsupported,
)
from kvbench.kernels.attention_launch import Question, Tuning, decode
from kvbench.kernels.packing import pack
from kvbench.kernels.states import PackedStates, Span, States

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, H, D = 2, 2, 128


@dataclass(frozen=True)
class Known:
    """States beside the numbers they stand for, in float64, worked out before packing."""

    states: States
    numbers: np.ndarray


def exact(n: int, channels: int = D, dtype: torch.dtype = torch.float16) -> Known:
    states = torch.randn(B, H, n, channels).to(dtype)
    return Known(states.to(DEVICE), states.double().numpy())


def packed(
    n: int,
    bits: int = 2,
    group: int = D,
    zero: str = "float",
    along: str = "channels",
    channels: int = D,
) -> Known:
    codes = torch.randint(0, 2**bits, (B, H, n, channels), dtype=torch.uint8)
    axis = 3 if along == "channels" else 2
    shape = [B, H, n, channels]
    shape[axis] //= group
    scale = ((torch.rand(shape) + 0.5) * 4 / 2**bits).half()
    wide = scale.double().repeat_interleave(group, axis).numpy()
    numbers = codes.double().numpy()
    if zero == "symmetric":
        zeros, numbers = None, (numbers - 2 ** (bits - 1)) * wide
    else:
        zeros = (
            torch.randint(-1, 2**bits, shape).short()
            if zero == "int"
            else torch.randn(shape).half()
        )
        spread = zeros.double().repeat_interleave(group, axis).numpy()
        numbers = (numbers - spread) * wide if zero == "int" else numbers * wide + spread
    zeros = None if zeros is None else zeros.to(DEVICE)
    states = PackedStates(
        pack(codes, bits).to(DEVICE),
        scale.to(DEVICE),
        zeros,
        bits,
        group,
        along,  # type: ignore[arg-type]
    )
    return Known(states, numbers)


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclass(frozen=True)
class Piece:
    """A span as the test knows it; places are lists over rows."""

    keys: Known
    values: Known
    lengths: tuple[int, ...]
    key_starts: tuple[int, ...] | None = None
    value_starts: tuple[int, ...] | None = None
    columns: np.ndarray | None = None

    @property
    def span(self) -> Span:
        starts = [s and numbers(*s) for s in (self.key_starts, self.value_starts)]
        columns = None if self.columns is None else torch.from_numpy(self.columns).int().to(DEVICE)
        return Span(
            self.keys.states, self.values.states, numbers(*self.lengths), *starts, columns=columns
        )


def by_hand(
    query: Tensor,
    pieces: Sequence[Piece],
    softcap: float | None = None,
    window: int | None = None,
    columns: Sequence[int] = (),
) -> np.ndarray:
    """Attention row by row, head by head, in float64."""
    q = query.cpu().double().numpy()
    out = np.zeros(q.shape)
    for row in range(B):
        for head in range(q.shape[1]):
            logits, values = [np.zeros(0)], [np.zeros((0, q.shape[2]))]
            for piece in pieces:
                token = np.arange(piece.lengths[row])
                at = [
                    (token + (0 if starts is None else starts[row])) % side.numbers.shape[2]
                    for side, starts in (
                        (piece.keys, piece.key_starts),
                        (piece.values, piece.value_starts),
                    )
                ]
                if window is not None and piece.columns is not None:
                    seen = piece.columns[row, at[0]] > columns[row] - window
                    at = [index[seen] for index in at]
                key_head = head * H // q.shape[1]
                logits.append(piece.keys.numbers[row, key_head, at[0]] @ q[row, head] * 0.1)
                values.append(piece.values.numbers[row, key_head, at[1]])
            scores = np.concatenate(logits)
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if scores.size:
                p = np.exp(scores - scores.max())
                out[row, head] = p @ np.concatenate(values) / p.sum()
    return out


def check(
    pieces: Sequence[Piece],
    heads: int = H,
    dtype: torch.dtype = torch.float16,
    splits: Sequence[int] = (1, 1, 1),
    tile: int = 32,
    size: float = 1.0,
    columns: Sequence[int] = (),
    **settings: Any,
) -> None:
    """The kernels (interpreted without CUDA) and the reference against `by_hand`."""
    channels = pieces[0].keys.numbers.shape[3]
    query = (torch.randn(B, heads, channels) * size).to(dtype).to(DEVICE)
    spans = [piece.span for piece in pieces]
    assert unsupported(query, spans) is None
    wanted = by_hand(query, pieces, columns=columns, **settings)
    if columns:
        settings["columns"] = numbers(*columns)
    out = torch.full_like(query, torch.nan)
    tunings = [Tuning(tile, 1, 2)] * len(spans)
    decode(Question(query, 0.1, **settings), spans, out, splits[: len(spans)], tunings)
    # Probabilities are rounded to the states' type, whatever the query's.
    assert error(out, wanted) < (1e-5 if dtype == torch.float32 else 1e-3)
    bound = 1e-5 if dtype == torch.float32 else 5e-4
    assert error(reference(query, spans, 0.1, **settings), wanted) < bound
    assert error(decode_attention(query, spans, 0.1, **settings), wanted) < 1e-3


def error(out: Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(out.cpu().double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("bits", "group", "zero"),
    [
        (1, 128, "float"),
        (2, 128, "float"),
        (2, 32, "int"),
        (2, 16, "symmetric"),
        (4, 128, "symmetric"),
        (4, 32, "float"),
        (8, 128, "int"),
        (8, 32, "float"),
    ],
)
def test_codes_of_every_width_group_and_zero(bits: int, group: int, zero: str) -> None:
    keys, values = packed(72, bits, group, zero), packed(72, bits, group, zero)
    check([Piece(keys, values, (41, 72))])


@pytest.mark.parametrize(("zero", "group"), [("float", 64), ("int", 16), ("symmetric", 32)])
def test_keys_with_groups_along_tokens(zero: str, group: int) -> None:
    keys = packed(128, 2, group, zero, "tokens")
    check([Piece(keys, packed(128, 2), (128, 37))], tile=64)
    check([Piece(keys, exact(64), (60, 51), (101, 3), (50, 1))])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_states_in_a_ring(dtype: torch.dtype) -> None:
    keys, values = exact(50, dtype=dtype), exact(40, dtype=dtype)
    check([Piece(keys, values, (40, 23), (30, 49), (39, 2))], heads=4, dtype=dtype)


@pytest.mark.parametrize("splits", [(1, 1, 1), (3, 3, 3), (2, 1, 3)])
def test_spans_of_all_precisions_are_one_softmax(splits: Sequence[int]) -> None:
    pieces = [
        Piece(packed(64), packed(64, 4, 64, "int"), (40, 0)),
        Piece(exact(48), packed(48, 8), (0, 40), (9, 9)),
        Piece(exact(48), exact(48), (17, 48), (40, 9), (9, 40)),
    ]
    check(pieces, heads=4, splits=splits)


@pytest.mark.parametrize(
    ("copies", "tile"), [(1, 64), (3, 16), (4, 128), (7, 64), (8, 16), (12, 32), (16, 64)]
)
def test_query_heads_share_key_heads(copies: int, tile: int) -> None:
    pieces = [Piece(packed(64), packed(64), (64, 23)), Piece(exact(32), exact(32), (3, 0))]
    check(pieces, heads=copies * H, tile=tile)


@pytest.mark.parametrize("channels", [32, 64, 80, 96, 256])
def test_head_sizes(channels: int) -> None:
    two = [packed(40, 2, channels, channels=channels) for _ in range(2)]
    four = [packed(40, 4, channels // 2, "int", channels=channels) for _ in range(2)]
    tail = [exact(32, channels) for _ in range(2)]
    lengths = (40, 11), (33, 40), (30, 2)
    check([Piece(*sides, n) for sides, n in zip((two, four, tail), lengths, strict=True)])


def test_softcap_and_window() -> None:
    order = np.stack([np.random.default_rng(0).permutation(64) for _ in range(B)])
    pieces = [
        Piece(packed(64), packed(64), (50, 64), columns=order),
        Piece(exact(32), exact(32), (30, 9), (5, 30), (31, 2), columns=order[:, :32] + 60),
    ]
    check(pieces, heads=4, softcap=2.0)
    check(pieces, heads=4, softcap=2.0, window=30, columns=(65, 90))


@pytest.mark.parametrize("size", [1e-6, 1.0, 500.0])
def test_queries_of_any_size(size: float) -> None:
    check([Piece(packed(64), packed(64), (64, 40))], size=size)


def test_what_lies_beyond_a_row_does_not_matter() -> None:
    keys, values, tail = packed(64), packed(64), exact(32)
    for states in (keys.states, values.states):
        assert isinstance(states, PackedStates) and states.zero is not None
        states.scale[:, :, 20:], states.zero[:, :, 20:] = torch.nan, torch.inf
    assert isinstance(tail.states, Tensor)
    tail.states[:, :, 7:] = torch.nan
    check([Piece(keys, values, (20, 13)), Piece(tail, tail, (7, 2))])


def test_a_row_without_tokens_is_zero() -> None:
    spans = [Piece(packed(64), packed(64), (0, 5)).span, Piece(exact(32), exact(32), (0, 0)).span]
    query = torch.randn(B, 4, D).half().to(DEVICE)
    for splits in (1, 2):
        out = torch.full_like(query, torch.nan)
        decode(Question(query, 0.1), spans, out, (splits, 1))
        assert not out[0].any() and out[1].isfinite().all()
    assert not decode_attention(query, spans, 0.1)[0].any()
    nothing = [Piece(exact(0), exact(0), (0, 0)).span]
    assert not decode_attention(query, nothing, 0.1).any()


def test_views_are_read_where_they_are() -> None:
    def view(known: Known) -> Known:
        """The same states amid others, heads innermost, as slices of one larger buffer."""

        def amid(x: Tensor) -> Tensor:
            wide = torch.full((B, x.shape[2] + 16, H + 1, x.shape[3]), 77, device=DEVICE).to(
                x.dtype
            )
            wide[:, 8:-8, :H] = x.transpose(1, 2)
            return wide[:, 8:-8, :H].transpose(1, 2)

        states = known.states
        if isinstance(states, Tensor):
            return Known(amid(states), known.numbers)
        assert states.zero is not None
        moved = replace(
            states, codes=amid(states.codes), scale=amid(states.scale), zero=amid(states.zero)
        )
        return Known(moved, known.numbers)

    pieces = [
        Piece(view(packed(48, 2, 64)), view(packed(48, 4)), (48, 9)),
        Piece(view(exact(24)), view(exact(24)), (24, 20), (3, 4)),
    ]
    check(pieces, heads=4)


def test_long_packed_spans_are_cut_and_short_ones_fill_the_device() -> None:
    def count(states: States, wanted: int) -> int:
        return _split_count(Span(states, states, torch.ones(1)), wanted)

    def codes(tokens: int) -> PackedStates:
        room = torch.empty(1, 1, tokens, 32, dtype=torch.uint8, device="meta")
        return PackedStates(room, room, None, 2, D)

    tokens = torch.empty(1, 1, 4096, D, device="meta")
    assert count(codes(4096), 0) == 4
    assert count(codes(4096), 9) == 9
    assert count(codes(600), 0) == 1
    assert count(codes(600), 9) == 2  # 256 tokens each, at least
    assert count(tokens, 0) == 1
    assert count(tokens, 100) == 16
    assert count(codes(2**20), 0) == MAX_SPLITS
    with pytest.raises(ValueError, match="at most"):
        split_counts(tokens, [], MAX_SPLITS + 1)


def test_the_answer_goes_where_it_is_asked_for() -> None:
    span = Piece(exact(20), exact(20), (20, 3)).span
    query = torch.randn(B, 2, D).half().to(DEVICE)
    room = torch.zeros(B, 5, D, dtype=query.dtype, device=DEVICE)
    out = decode_attention(query, [span], 0.1, out=room[:, 1:3])
    assert out.data_ptr() == room[:, 1:3].data_ptr()
    assert torch.equal(room[:, 1:3], decode_attention(query, [span], 0.1))
    assert not room[:, 0].any() and not room[:, 3:].any()


def narrow(known: Known) -> Known:
    """The same with scales of one byte."""
    states = known.states
    assert isinstance(states, PackedStates) and states.zero is not None
    scale = states.scale.to(torch.float8_e4m3fn)
    share = scale.cpu().double().numpy() / states.scale.cpu().double().numpy()
    zero = states.zero.cpu().double().numpy()
    return Known(replace(states, scale=scale), (known.numbers - zero) * share + zero)


@pytest.mark.parametrize(
    ("piece", "heads", "reason"),
    [
        (Piece(packed(32), packed(32), (1, 1)), 17 * H, "17 query heads"),
        (Piece(packed(32), packed(32, along="tokens", group=32), (1, 1)), H, "values"),
        (Piece(packed(24, group=24, along="tokens"), exact(32), (1, 1)), H, "24 tokens"),
        (Piece(exact(32), packed(32, 2, 8), (1, 1)), H, None),
        (Piece(narrow(packed(32)), packed(32), (1, 1)), H, "float8"),
    ],
)
def test_what_the_kernels_cannot_read_has_a_reason(
    piece: Piece, heads: int, reason: str | None
) -> None:
    query = torch.randn(B, heads, D).half().to(DEVICE)
    said = unsupported(query, [piece.span])
    assert said is None if reason is None else reason in str(said)
    # It is computed all the same.
    assert error(decode_attention(query, [piece.span], 0.1), by_hand(query, [piece])) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_a_captured_graph_follows_lengths() -> None:
    keys, values = packed(512), packed(512)
    lengths = numbers(100, 7)
    span = Span(keys.states, values.states, lengths)
    query = torch.randn(B, H, D, device=DEVICE).half()
    out = decode_attention(query, [span], 0.1, splits=2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(query, [span], 0.1, splits=2)
    lengths.copy_(numbers(512, 300))
    graph.replay()
    assert error(out, by_hand(query, [Piece(keys, values, (512, 300))])) < 1e-3
