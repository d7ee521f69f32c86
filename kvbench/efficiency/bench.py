"""What the kernels do on this GPU beside what it can do at most: one process, in turns, medians.

Decode attention reads every byte of the cache once and does little arithmetic, so its floor is the
bytes of keys, values and metadata over the bandwidth of a large copy. torch's
`scaled_dot_product_attention` on the same shape in float16 is what a 16-bit cache would take.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvbench.efficiency.ceilings import Ceilings, ceilings
from kvbench.errors import UserError
from kvbench.evaluation.environment import environment
from kvbench.kernels.attention import decode_attention, reference
from kvbench.kernels.states import PackedStates, Span, States

Key = TypeVar("Key")
CHECKED_ROWS = 2
"""Rows compared with the reference: all would need the dequantized cache of the whole batch."""


@dataclass(frozen=True)
class Part:
    """Tokens of one kind in every row of a case: bits of keys and values, 16 for exact ones."""

    tokens: int
    key_bits: int
    value_bits: int
    per_channel: bool = False
    """Keys in groups of 128 tokens, as KIVI's; otherwise a group is a token's D channels."""


@dataclass(frozen=True)
class Case:
    """One launch to time: B rows of Hq query heads over H key heads, and what they attend to."""

    name: str
    batch: int
    heads: int
    key_heads: int
    parts: tuple[Part, ...]
    channels: int = 128

    @property
    def tokens(self) -> int:
        """Of a row, all parts together."""
        return sum(part.tokens for part in self.parts)


SHAPES = ((64, 32, 32, 2048), (16, 32, 32, 8192), (64, 32, 8, 4096), (1, 32, 32, 32768))
"""Batch, query heads, key heads, tokens; the first is what the target figures are for."""


def cases(quick: bool = False) -> Iterator[tuple[str, list[Case]]]:
    """Groups of cases of one shape each, to be timed in turns against the same SDPA."""
    for batch, heads, key_heads, tokens in SHAPES[:1] if quick else SHAPES:
        name = f"B {batch}, H {heads}/{key_heads}, T {tokens}"
        formats = [(f"{bits}-bit", bits) for bits in (16, 4, 2)]
        parts = [(label, (Part(tokens, bits, bits),)) for label, bits in formats]
        yield name, [Case(label, batch, heads, key_heads, part) for label, part in parts]
    if not quick:
        akvq = (Part(900, 2, 2), Part(143, 16, 16))
        kivi = (Part(896, 2, 2, True), Part(128, 2, 16, True), Part(19, 16, 16))
        mixes = [("2-bit 900 + 16-bit 143", akvq), ("per-channel keys, 16-bit tail", kivi)]
        yield "B 256, H 32/32, T 1043", [Case(name, 256, 32, 32, parts) for name, parts in mixes]


def states(case: Case, part: Part, bits: int, along_tokens: bool) -> States:
    """Random states of about unit variance, packed or exact."""
    shape = (case.batch, case.key_heads, -(-part.tokens // 128) * 128, case.channels)
    if bits == 16:
        return torch.randn(shape, dtype=torch.float16, device="cuda")
    packed = (*shape[:3], case.channels * bits // 8)
    codes = torch.randint(0, 256, packed, dtype=torch.uint8, device="cuda")
    groups = (*shape[:2], shape[2] // 128, shape[3]) if along_tokens else (*shape[:3], 1)
    scale = torch.rand(groups, device="cuda") / 2**bits + 3 / 2**bits
    zero = -scale * (2**bits - 1) / 2 + torch.randn_like(scale) / 10
    group, along = (128, "tokens") if along_tokens else (case.channels, "channels")
    return PackedStates(codes, scale.half(), zero.half(), bits, group, along)  # type: ignore[arg-type]


def spans_of(case: Case) -> list[Span]:
    """The case's spans, every row at its full length."""
    lengths = (torch.full((case.batch,), part.tokens, dtype=torch.int32) for part in case.parts)
    return [
        Span(
            states(case, part, part.key_bits, part.per_channel),
            states(case, part, part.value_bits, False),
            length.cuda(),
        )
        for part, length in zip(case.parts, lengths, strict=True)
    ]


def nbytes(spans: Sequence[Span]) -> int:
    """Bytes that one step reads: of each row its length, of all tensors."""
    total = 0.0
    for span in spans:
        for side in (span.keys, span.values):
            room = (side if isinstance(side, Tensor) else side.codes).shape[2]
            total += side.nbytes * int(span.lengths[0]) / room
    return round(total)


def error_of(query: Tensor, spans: Sequence[Span], out: Tensor) -> float:
    """Relative error of the first rows against float32 attention on the dequantized cache."""
    few = slice(CHECKED_ROWS)
    scaling = query.shape[-1] ** -0.5
    wanted = reference(query[few].float(), [span[few] for span in spans], scaling)
    return float((out[few].float() - wanted).norm() / wanted.norm())


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """Work as a captured graph, so that launches from Python don't count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def replay() -> object:
        graph.replay()
        return work  # which holds what the graph reads

    return replay


def milliseconds(work: Callable[[], object]) -> float:
    """Median time with a cold L2."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=10, rep=40, return_mode="median"))


def in_turns(works: dict[Key, Callable[[], object]], turns: int = 3) -> dict[Key, float]:
    """Each work's median over turns, the works one after the other in every turn."""
    times: dict[Key, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            times[name].append(milliseconds(work))
    return {name: statistics.median(seen) for name, seen in times.items()}


def sdpa(case: Case) -> Callable[[], object]:
    """Torch's attention in float16 over a cache of the case's shape."""
    query = torch.randn(
        case.batch, case.heads, 1, case.channels, dtype=torch.float16, device="cuda"
    )
    shape = (case.batch, case.key_heads, case.tokens, case.channels)
    keys, values = (torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2))
    grouped = case.heads != case.key_heads
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, enable_gqa=grouped
    )


def attention_rows(group: str, members: Sequence[Case], bandwidth: float) -> list[dict[str, Any]]:
    """Time cases of one shape in turns with SDPA."""
    works, facts = {"SDPA": graphed(sdpa(members[0]))}, {}
    for case in members:
        torch.manual_seed(0)
        spans = spans_of(case)
        shape = (case.batch, case.heads, case.channels)
        query = torch.randn(shape, dtype=torch.float16, device="cuda")
        out = torch.full_like(query, math.nan)

        def work(query: Tensor = query, spans: list[Span] = spans, out: Tensor = out) -> object:
            return decode_attention(query, spans, query.shape[-1] ** -0.5, out=out)

        works[case.name] = graphed(work)
        out.fill_(math.nan)
        works[case.name]()
        facts[case.name] = (nbytes(spans), error_of(query, spans, out))
    times = in_turns(works)
    case = members[0]
    exact = 4 * case.batch * case.key_heads * case.tokens * case.channels
    table = [_row(group, "SDPA float16", times["SDPA"], exact, bandwidth, times["SDPA"], None)]
    for name, (size, error) in facts.items():
        table.append(_row(group, name, times[name], size, bandwidth, times["SDPA"], error))
    return table


def _row(
    group: str,
    name: str,
    ms: float,
    size: int,
    bandwidth: float,
    sdpa_ms: float,
    error: float | None,
) -> dict[str, Any]:
    return {
        "shape": group,
        "kernel": name,
        "ms": ms,
        "bytes": size,
        "share_of_copy": size / (ms / 1e3) / bandwidth,
        "times_sdpa": sdpa_ms / ms,
        "error": error,
    }


def quantize_rows(bandwidth: float) -> list[dict[str, Any]]:
    """Quantization and packing of 512 tokens of 64 rows, 2 and 4 bits, as methods pair them.

    Groups along channels are rotated in the same pass; groups along tokens are nowhere rotated.
    """
    from kvbench.kernels.quantize import Rounding, quantize_into

    case = Case("quantize", 64, 32, 32, (Part(512, 2, 2),))
    x = torch.randn(
        case.batch, case.key_heads, 512, case.channels, dtype=torch.float16, device="cuda"
    )
    works, sizes = {}, {}
    for bits in (2, 4):
        for along_tokens in (False, True):
            out = states(case, Part(512, bits, bits, along_tokens), bits, along_tokens)
            assert isinstance(out, PackedStates)
            rounding = Rounding(bits, out.group, out.along, out.zero_kind)
            rotate = not along_tokens
            name = f"{'Hadamard, ' if rotate else ''}{bits}-bit, groups along {out.along}"

            def work(
                rounding: Rounding = rounding, out: PackedStates = out, rotate: bool = rotate
            ) -> None:
                quantize_into(x, rounding, out, rotate=rotate)

            works[name], sizes[name] = graphed(work), x.nbytes + out.nbytes
    times = in_turns(works)
    shape = "B 64, H 32, T 512"
    return [
        _row(shape, name, ms, sizes[name], bandwidth, math.nan, None) for name, ms in times.items()
    ]


def run(quick: bool = False) -> dict[str, Any]:
    """All measurements of this GPU; raises `UserError` without CUDA."""
    if not torch.cuda.is_available():
        raise UserError("kvbench bench kernels needs a CUDA device; none was found.")
    limits = ceilings(torch.device("cuda"))
    bandwidth = limits.copy_bandwidth
    result: dict[str, Any] = {**asdict(limits), "environment": environment(), "rows": []}
    for group, members in cases(quick):
        result["rows"] += attention_rows(group, members, bandwidth)
        torch.cuda.empty_cache()
    result["rows"] += quantize_rows(bandwidth)
    return result


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    from tabulate import tabulate

    head = Ceilings(result["device"], result["copy_bandwidth"], result["matmul_rate"])
    lines = [
        (
            row["shape"],
            row["kernel"],
            f"{row['ms']:.3f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['share_of_copy']:.0%}",
            "" if math.isnan(row["times_sdpa"]) else f"{row['times_sdpa']:.2f}",
            "" if row["error"] is None else f"{row['error']:.1e}",
        )
        for row in result["rows"]
    ]
    columns = ("shape", "kernel", "ms", "MB", "of copy", "x SDPA", "error")
    return f"{head}\n\n" + tabulate(lines, columns, disable_numparse=True)
