"""Which launch of decode attention is fastest on this GPU: every tuning of a grid, timed in turns.

Kernels are compiled by several processes first, into Triton's cache on disk, on one row: nothing
that is compiled depends on the number of rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from kvbench.efficiency.bench import Case, Part, graphed, in_turns, nbytes, spans_of
from kvbench.efficiency.ceilings import copy_bandwidth
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.kernels.attention_launch import Tuning


def _case(bits: int, batch: int, key_heads: int, tokens: int) -> Case:
    name = f"{bits}-bit, B {batch}, H 32/{key_heads}, T {tokens}"
    return Case(name, batch, 32, key_heads, (Part(tokens, bits, bits),))


SWEPT = (
    _case(2, 64, 32, 2048),
    _case(2, 347, 32, 730),
    _case(2, 129, 32, 4112),
    _case(2, 64, 8, 4096),
    _case(4, 64, 32, 2048),
    _case(4, 64, 8, 4096),
    _case(16, 64, 32, 856),
    _case(16, 347, 32, 143),
)
"""Shapes of the published tables, and what AKVQ-VL's layers read at their largest batches."""
SHOWN = 5
"""Fastest tunings of a shape, to be timed again in turns."""
COMPILERS = 12
"""Processes at most."""


@dataclass(frozen=True)
class Timed:
    """A tuning of a case, its milliseconds and its share of the copy bandwidth."""

    case: str
    tuning: Tuning
    ms: float
    share_of_copy: float


def tunings_of(bits: int) -> Iterator[Tuning]:
    """Worth a try: tokens a step, warps, stages, and where codes are unpacked also registers."""
    from kvbench.kernels.attention_launch import Tuning

    tiles = (16, 32, 64) if bits == 16 else (32, 64, 128)
    for tile, warps, stages in product(tiles, (1, 2), (1, 2, 3, 4)):
        yield Tuning(tile, warps, stages)
    if bits < 16:
        for tile, stages, registers in product((32, 64), (1, 2, 3), (80, 96, 112, 128)):
            yield Tuning(tile, 1, stages, registers)


def sweep(name: str = "") -> Iterator[list[Timed]]:
    """For each case whose name contains `name`: its fastest tunings, fastest first.

    Raises:
        UserError: There is no CUDA device, or no case of that name.
    """
    if not torch.cuda.is_available():
        raise UserError("kvbench bench tunings needs a CUDA device; none was found.")
    cases = [case for case in SWEPT if name in case.name]
    if not cases:
        known = "; ".join(case.name for case in SWEPT)
        raise UserError(f"no shape is named {name!r}: give a part of one of: {known}")
    _compile_all(cases)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    for case in cases:
        yield _fastest(case, bandwidth)
        torch.cuda.empty_cache()


def table(timed: Sequence[Timed]) -> str:
    """A case's tunings as text."""
    from tabulate import tabulate

    lines = [
        (*one.tuning[:3], one.tuning.registers or "", f"{one.ms:.4f}", f"{one.share_of_copy:.0%}")
        for one in timed
    ]
    columns = ("tile", "warps", "stages", "registers", "ms", "of copy")
    return timed[0].case + "\n\n" + tabulate(lines, columns, disable_numparse=True)


def _compile_all(cases: Sequence[Case]) -> None:
    distinct = {(case.parts, case.heads // case.key_heads): case for case in cases}
    work = [
        (replace(case, batch=1), tuning)
        for case in distinct.values()
        for tuning in tunings_of(case.parts[0].key_bits)
    ]
    count = min(os.cpu_count() or 1, COMPILERS)
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        list(pool.map(_compile, [work[place::count] for place in range(count)]))


def _compile(work: Sequence[tuple[Case, Tuning]]) -> None:
    for case, tuning in work:
        _runs(_launches(case, [tuning])[tuning])


def _launches(case: Case, tunings: Sequence[Tuning]) -> dict[Tuning, Callable[[], object]]:
    """The case's launch in every tuning, over one and the same cache."""
    from kvbench.kernels.attention import split_count
    from kvbench.kernels.attention_launch import Question, decode

    spans = spans_of(case)
    shape = (case.batch, case.heads, case.channels)
    query = torch.randn(shape, dtype=torch.float16, device="cuda")
    question, splits = Question(query, case.channels**-0.5), split_count(query, spans)
    out = torch.empty_like(query)
    return {tuning: partial(decode, question, spans, out, splits, [tuning]) for tuning in tunings}


def _runs(work: Callable[[], object]) -> bool:
    """Whether the GPU can run a launch: one may ask for more than a multiprocessor has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        work()
        torch.cuda.synchronize()
    except (OutOfResources, PTXASError):
        return False
    return True


def _fastest(case: Case, bandwidth: float) -> list[Timed]:
    """Time all tunings once, and the fastest of them again in turns."""
    launches = _launches(case, list(tunings_of(case.parts[0].key_bits)))
    graphs = {tuning: graphed(work) for tuning, work in launches.items() if _runs(work)}
    once = in_turns(graphs, turns=1)
    best = sorted(once, key=lambda tuning: once[tuning])[:SHOWN]
    again = in_turns({tuning: graphs[tuning] for tuning in best})
    size = nbytes(spans_of(case))
    return [
        Timed(case.name, tuning, ms, size / (ms / 1e3) / bandwidth)
        for tuning, ms in sorted(again.items(), key=lambda item: item[1])
    ]
