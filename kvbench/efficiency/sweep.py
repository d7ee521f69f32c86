"""Try many ways to cut the decode-attention kernels: ``python -m kvbench.efficiency.sweep``.

Compiles in worker processes first, then times each on the device alone and prints the best; what
wins goes into the table in kvbench/kernels/attention_launch.py by hand.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvbench.efficiency.bench import (
    Case,
    Part,
    error_of,
    graphed,
    in_turns,
    milliseconds,
    nbytes,
    sdpa,
    spans_of,
)
from kvbench.efficiency.ceilings import copy_bandwidth

WORKERS = 14
Cut = tuple[tuple[int, int, int, int | None], int]
"""A tuning and the splits."""

PLANS: tuple[tuple[Case, tuple[int, ...], tuple[int, ...], tuple[int | None, ...]], ...] = tuple(
    (Case(f"{bits}-bit", *shape, (Part(tokens, bits, bits),)), splits, tiles, registers)
    for bits, tiles, registers in (
        (2, (64, 128), (None, 168, 128)),
        (4, (64, 128), (None, 168, 128)),
        (16, (16, 32, 64), (None,)),
    )
    for shape, tokens, splits in (
        ((64, 32, 32), 2048, (1, 2, 4)),
        ((64, 32, 8), 4096, (2, 4, 8)),
    )
)


def cuts(plan: tuple[Any, ...]) -> list[Cut]:
    """All ways to try for a case."""
    case, splits, tiles, registers = plan
    exact = case.parts[0].key_bits == 16
    warps, stages = ((1, 2, 4), (2, 3, 4)) if exact else ((1,), (2, 3))
    tunings = itertools.product(tiles, warps, stages, registers)
    return [(tuning, count) for tuning in tunings for count in splits]


def attend(case: Case, cut: Cut) -> tuple[Any, Any, Any, Any]:
    """Inputs of a case and the work that a cut does on them."""
    from kvbench.kernels.attention_launch import Question, Tuning, decode

    spans = spans_of(case)
    query = torch.randn(case.batch, case.heads, case.channels, dtype=torch.float16, device="cuda")
    out = torch.full_like(query, math.nan)

    def work(cut: Cut = cut) -> None:
        tunings = [Tuning(*cut[0])] * len(spans)
        decode(Question(query, case.channels**-0.5), spans, out, cut[1], tunings)

    return query, spans, out, work


def compile_one(job: tuple[Case, Cut]) -> str:
    """Fill the compiler's cache with a small run of the same specialization."""
    case, cut = job
    small = replace(case, batch=1, parts=tuple(replace(p, tokens=256) for p in case.parts))
    try:
        attend(small, cut)[3]()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def sweep(plan: tuple[Any, ...], broken: set[tuple[Case, Cut]]) -> list[dict[str, Any]]:
    """Time all cuts of a case, fastest first."""
    case = plan[0]
    query, spans, out, work = attend(case, cuts(plan)[0])
    results = []
    for cut in cuts(plan):
        if (case, cut) in broken:
            continue
        try:
            replay = graphed(lambda cut=cut: work(cut))  # type: ignore[misc]
            out.fill_(math.nan)
            replay()
            error = error_of(query, spans, out)
            ms = milliseconds(replay, 8)
        except Exception as reason:
            print(case.name, cut, type(reason).__name__, str(reason)[:100], flush=True)
            continue
        results.append({"cut": cut, "ms": ms, "error": error, "work": replay})
    return sorted(results, key=lambda result: result["ms"])


def main(plans: Sequence[Any], out: Path | None) -> None:
    """Compile, time, print."""
    began = time.monotonic()
    jobs = [(plan[0], cut) for plan in plans for cut in cuts(plan)]
    jobs = list({(c, (t, min(n, 2))): None for c, (t, n) in jobs})
    with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
        answers = pool.map(compile_one, jobs, chunksize=1)
    failed = {job: answer for job, answer in zip(jobs, answers, strict=True) if answer}
    print(
        f"{len(jobs)} kernels compiled in {time.monotonic() - began:.0f} s; failed: {len(failed)}"
    )
    for job, answer in list(failed.items())[:5]:
        print("  ", job, answer)
    bandwidth = copy_bandwidth(torch.device("cuda"))
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    broken = {(c, (t, n)) for (c, (t, _)) in failed for n in (1, 2, 4, 8)}
    log = []
    for plan in plans:
        case = plan[0]
        size = nbytes(spans_of(replace(case, batch=1))) * case.batch
        results = sweep(plan, broken)
        best = {str(i): result["work"] for i, result in enumerate(results[:3])}
        times = in_turns({"SDPA": graphed(sdpa(case)), **best})
        print(
            f"\n{case.name} B {case.batch} H {case.heads}/{case.key_heads} T {case.tokens}: "
            f"SDPA {times['SDPA']:.3f} ms, floor {size / bandwidth * 1e3:.3f} ms"
        )
        for i, result in enumerate(results[:6]):
            ms = times.get(str(i), result["ms"])
            share = size / ms * 1e3 / bandwidth
            print(
                f"   {ms:.3f} ms  x{times['SDPA'] / ms:.2f}  {share:.0%} of copy"
                f"  err {result['error']:.1e}  {result['cut']}",
                flush=True,
            )
        kept = [{key: r[key] for key in ("cut", "ms", "error")} for r in results]
        log.append({"case": case.name, "heads": case.key_heads, "sdpa": times["SDPA"], "all": kept})
        torch.cuda.empty_cache()
    if out is not None:
        out.write_text(json.dumps(log), encoding="utf-8")
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    torch.manual_seed(0)
    chosen = [plan for plan in PLANS if len(sys.argv) < 3 or plan[0].name in sys.argv[2].split(",")]
    main(chosen, Path(sys.argv[1]) if len(sys.argv) > 1 else None)
