"""Which launch of decode attention is fastest on this GPU: every tuning of a grid, timed in turns.

Kernels are compiled by several processes first, into Triton's cache on disk, on one row: attention
does not depend on the number of rows, and the merge that does is small.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import TYPE_CHECKING

import torch

from kvbench.efficiency.bench import Case, Part, error_of, graphed, in_turns, nbytes, spans_of
from kvbench.efficiency.ceilings import copy_bandwidth
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.kernels.attention_launch import Tuning

    Tunings = tuple[Tuning, ...]


def _case(batch: int, key_heads: int, *parts: tuple[int, int]) -> Case:
    """Parts are bits and tokens."""
    name = " and ".join(f"{bits}-bit T {tokens}" for bits, tokens in parts)
    spans = tuple(Part(tokens, bits, bits) for bits, tokens in parts)
    return Case(f"{name}, B {batch}, H 32/{key_heads}", batch, 32, key_heads, spans)


SWEPT = (
    _case(64, 32, (2, 2048)),
    _case(64, 8, (2, 4096)),
    _case(64, 32, (4, 2048)),
    _case(64, 8, (4, 4096)),
    _case(64, 32, (16, 856)),
    _case(64, 8, (16, 856)),
    _case(347, 32, (2, 730), (16, 143)),
    _case(129, 32, (2, 4112), (16, 143)),
)
"""Shapes of the published tables, and what AKVQ-VL's layers read at their largest batches."""
SHOWN = 5
"""Fastest tunings of a shape, to be timed again in turns."""
COMPILERS = 12
"""Processes at most."""


@dataclass(frozen=True)
class Timed:
    """A tuning for each of a case's spans, milliseconds, share of copy bandwidth, and error.

    The error is relative, against float32 attention on the dequantized cache.
    """

    case: str
    tunings: Tunings
    ms: float
    share_of_copy: float
    error: float


def tunings_of(case: Case) -> Iterator[Tunings]:
    """Worth a try: tokens a step, warps and stages; only what is likely where spans are several."""
    from kvbench.kernels.attention_launch import Tuning

    single = len(case.parts) == 1
    choices = []
    for part in case.parts:
        exact = part.key_bits == 16
        if single:
            grid = product((16, 32, 64) if exact else (32, 64, 128), (1, 2), (1, 2, 3, 4))
        else:
            grid = product((16, 32) if exact else (64, 128), (1,), (2, 3))
        choices.append([Tuning(*each) for each in grid])
    yield from product(*choices)


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
        (
            "; ".join(str(tuple(tuning)) for tuning in one.tunings),
            f"{one.ms:.4f}",
            f"{one.share_of_copy:.0%}",
            f"{one.error:.1e}",
        )
        for one in timed
    ]
    columns = ("tile, warps, stages of each span", "ms", "of copy", "error")
    return timed[0].case + "\n\n" + tabulate(lines, columns, disable_numparse=True)


def _compile_all(cases: Sequence[Case]) -> None:
    distinct = {(*(part.key_bits for part in case.parts), case.key_heads): case for case in cases}
    work = [
        (replace(case, batch=1), tunings)
        for case in distinct.values()
        for tunings in tunings_of(case)
    ]
    count = min(os.cpu_count() or 1, COMPILERS)
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        list(pool.map(_compile, [work[place::count] for place in range(count)]))


def _compile(work: Sequence[tuple[Case, Tunings]]) -> None:
    for case, tunings in work:
        _runs(_Launch(case), tunings)


class _Launch:
    """A case's decode attention, in any tuning, over one and the same cache."""

    def __init__(self, case: Case) -> None:
        from kvbench.kernels.attention import split_counts
        from kvbench.kernels.attention_launch import Question

        torch.manual_seed(0)
        self.spans = spans_of(case)
        shape = (case.batch, case.heads, case.channels)
        self.query = torch.randn(shape, dtype=torch.float16, device="cuda")
        self.out = torch.empty_like(self.query)
        self._question = Question(self.query, case.channels**-0.5)
        self._splits = split_counts(self.query, self.spans)

    def __call__(self, tunings: Tunings) -> None:
        from kvbench.kernels.attention_launch import decode

        decode(self._question, self.spans, self.out, self._splits, tunings)

    def error(self, tunings: Tunings) -> float:
        self.out.fill_(torch.nan)
        self(tunings)
        return error_of(self.query, self.spans, self.out)


def _runs(launch: _Launch, tunings: Tunings) -> bool:
    """Whether the GPU can run a launch: one may ask for more than a multiprocessor has."""
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        launch(tunings)
        torch.cuda.synchronize()
    except (OutOfResources, PTXASError):
        return False
    return True


def _fastest(case: Case, bandwidth: float) -> list[Timed]:
    """Time all tunings once, and the fastest of them again in turns."""
    launch = _Launch(case)
    graphs = {
        tunings: graphed(partial(launch, tunings))
        for tunings in tunings_of(case)
        if _runs(launch, tunings)
    }
    once = in_turns(graphs, turns=1)
    best = sorted(once, key=lambda tunings: once[tunings])[:SHOWN]
    again = in_turns({tunings: graphs[tunings] for tunings in best})
    size = nbytes(launch.spans)
    return [
        Timed(case.name, each, ms, size / (ms / 1e3) / bandwidth, launch.error(each))
        for each, ms in sorted(again.items(), key=lambda item: item[1])
    ]
