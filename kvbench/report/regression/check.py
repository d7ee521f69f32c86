"""The rules: what of a run is worse than its baseline, cell by cell and over a method's tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from kvbench.evaluation.rows import PROTOCOLS, STATUSES
from kvbench.evaluation.statistics import (
    Paired,
    bootstrap_difference,
    corrected_level,
    mcnemar,
    pair,
    smallest_loss,
)
from kvbench.report.paper import paper_table, rank
from kvbench.report.regression.outcomes import SETTINGS, CellKey, Cells, Outcome, by_cell
from kvbench.report.regression.result import (
    MEAN,
    Comparison,
    Divergence,
    Fault,
    Kind,
    Limits,
    Line,
    Method,
)

_NO_KL = 1e-9
"""Nats below which two distributions are the same."""


def check(run: Iterable[Outcome], baseline: Iterable[Outcome], limits: Limits) -> Comparison:
    """Hold a run against a baseline; cells that only the run has are not judged.

    Raises:
        UserError: A sample is in one of them twice.
    """
    now, before = by_cell(run, "the run"), by_cell(baseline, "the baseline")
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for key in sorted(before, key=_order):
        line = _cell(key, before[key], now.get(key, {}), limits)
        grouped.setdefault((key.model, key.protocol, key.method), []).append(line)
    pairs = [(_mean(lines), lines) for lines in grouped.values()]
    # The mean of a single task is the same test once more.
    tests = [line for mean, tasks in pairs for line in (mean, *(tasks if len(tasks) > 1 else ()))]
    level = corrected_level([line.counts.lost + line.counts.gained for line in tests], limits.alpha)
    kl_level = limits.alpha / max(sum(mean.divergence is not None for mean, _ in pairs), 1)
    methods = tuple(
        Method(
            _further(_judged(mean, tasks, limits, level), limits, kl_level),
            tuple(_judged(task, [task], limits, level) for task in tasks),
        )
        for mean, tasks in pairs
    )
    return Comparison(methods, limits, level, tuple(_notes(before, now)))


def _order(key: CellKey) -> tuple[object, ...]:
    paper = paper_table()
    return (
        rank(paper.models, key.model),
        PROTOCOLS.index(key.protocol),
        rank(paper.methods, key.method),
        rank(paper.tasks, key.task),
    )


def _cell(
    key: CellKey, before: Mapping[int, Outcome], now: Mapping[int, Outcome], limits: Limits
) -> Line:
    if not now:
        return Line(key, Paired(0, 0, 0), faults=(Fault(Kind.MISSING, "is not in the run"),))
    both = [(before[sample], now[sample]) for sample in sorted(before.keys() & now.keys())]
    scored = [
        (old, new)
        for old, new in both
        if old.correct is not None and new.correct is not None and old.prompt == new.prompt
    ]
    line = Line(key, Paired(0, 0, 0), faults=tuple(_other_samples(before, now, both, limits)))
    if not scored:
        return line
    old_right = [bool(old.correct) for old, _ in scored]
    new_right = [bool(new.correct) for _, new in scored]
    line = replace(
        line,
        counts=pair(old_right, new_right),
        before=fmean(old_right),
        now=fmean(new_right),
        bits=_averages(scored, lambda one: one.bits_per_element),
        nbytes=_averages(scored, lambda one: one.cache_bytes),
        divergence=_divergence(scored),
    )
    return replace(line, faults=(*line.faults, *_growth(line, limits)))


def _other_samples(
    before: Mapping[int, Outcome],
    now: Mapping[int, Outcome],
    both: Sequence[tuple[Outcome, Outcome]],
    limits: Limits,
) -> Iterable[Fault]:
    """What keeps the two from being the same samples."""
    sides = [
        sorted({f"{one.dataset}, task version {one.task_version}" for one in side.values()})
        for side in (before, now)
    ]
    if sides[0] != sides[1]:
        yield Fault(Kind.DATA, f"asks {'; '.join(sides[1])}, not {'; '.join(sides[0])}")
    if count := sum(old.prompt != new.prompt for old, new in both):
        yield Fault(Kind.PROMPT, f"asks {count} of {len(both)} samples with another prompt")
    count = sum(old.images != new.images for old, new in both)
    if count and not limits.any_images:
        yield Fault(Kind.IMAGES, f"shows {count} of {len(both)} samples other image files")
    worse = [
        new.status for old, new in both if STATUSES.index(new.status) > STATUSES.index(old.status)
    ]
    if worse:
        names = " or ".join(sorted(set(worse)))
        yield Fault(Kind.STATUS, f"ends in {names} for {len(worse)} of {len(both)} samples")
    old_ids, new_ids = (
        {sample for sample, one in side.items() if one.correct is not None}
        for side in (before, now)
    )
    if old_ids != new_ids:
        unread = sum(one.status == "ok" and one.correct is None for one in now.values())
        why = f"; {unread} never read the quantized cache" if unread else ""
        text = f"scores {len(new_ids)} samples instead of {len(old_ids)}"
        same = "" if len(new_ids) != len(old_ids) else ", not the same ones"
        yield Fault(Kind.COUNT, text + same + why)


def _growth(line: Line, limits: Limits) -> Iterable[Fault]:
    for kind, (old, new), digits in (
        (Kind.BITS, line.bits, 2),
        (Kind.BYTES, line.nbytes, 0),
    ):
        what = kind.removeprefix("more ")
        if old is not None and new is None:
            yield Fault(kind, f"has no {what} any more")
        elif old is not None and new is not None and new > old * (1 + limits.max_growth / 100):
            yield Fault(kind, f"takes {new:,.{digits}f} {what} instead of {old:,.{digits}f}")


def _averages(
    pairs: Sequence[tuple[Outcome, Outcome]], value: Callable[[Outcome], float | None]
) -> tuple[float | None, float | None]:
    """Means over the samples for which the baseline has the value."""
    given = [(value(old), value(new)) for old, new in pairs if value(old) is not None]
    sides = [[x for x in side if x is not None] for side in zip(*given, strict=True)] or [[], []]
    old, new = (fmean(side) if side and len(side) == len(given) else None for side in sides)
    return old, new


def _mean(tasks: Sequence[Line]) -> Line:
    """The mean of a method's tasks, each weighing the same; without those that lack a score."""
    key = replace(tasks[0].key, task=MEAN)
    scored = [line for line in tasks if line.counts.n]
    counts = Paired(
        sum(line.counts.n for line in scored),
        sum(line.counts.lost for line in scored),
        sum(line.counts.gained for line in scored),
    )
    return Line(
        key,
        counts,
        before=_average(line.before for line in scored),
        now=_average(line.now for line in scored),
        bits=(_average(line.bits[0] for line in scored), _average(line.bits[1] for line in scored)),
        nbytes=(
            _average(line.nbytes[0] for line in scored),
            _average(line.nbytes[1] for line in scored),
        ),
        divergence=_pooled([line.divergence for line in scored if line.divergence]),
    )


def _average(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def _divergence(pairs: Sequence[tuple[Outcome, Outcome]]) -> Divergence | None:
    """How KL moved; None where the samples have none, as those of the 16-bit cache itself."""
    ratios = [
        math.log(max(new.kl_mean, _NO_KL) / max(old.kl_mean, _NO_KL))
        for old, new in pairs
        if old.kl_mean is not None and new.kl_mean is not None
    ]
    if not ratios:
        return None
    return Divergence(sum(r > 0 for r in ratios), sum(r < 0 for r in ratios), fmean(ratios))


def _pooled(divergences: Sequence[Divergence]) -> Divergence | None:
    """Of several tasks, each weighing the same."""
    if not divergences:
        return None
    return Divergence(
        sum(one.further for one in divergences),
        sum(one.closer for one in divergences),
        fmean(one.log_ratio for one in divergences),
    )


def _judged(line: Line, tasks: Sequence[Line], limits: Limits, level: float) -> Line:
    """Add the paired test. A drop is one if it is large enough and not chance, by both tests."""
    counts = line.counts
    if not counts.n:
        return line
    interval = bootstrap_difference(
        [task.counts for task in tasks if task.counts.n], confidence=1 - level
    )
    least = smallest_loss(counts.n, counts.gained, level)
    line = replace(
        line,
        interval=interval,
        p=mcnemar(counts.lost, counts.gained),
        detectable=None if least is None else (least - counts.gained) / counts.n,
    )
    points = -100 * (line.difference or 0.0)
    if points > limits.max_drop and interval.high < 0 and line.p < level:
        fault = Fault(Kind.DROP, f"dropped by {points:.1f} points (p = {line.p:.2g})")
        line = replace(line, faults=(*line.faults, fault))
    return line


def _further(line: Line, limits: Limits, level: float) -> Line:
    """Add the fault of a KL that grew: by a sign test, which knows no scale."""
    moved = line.divergence
    if moved is None or limits.max_kl is None or moved.ratio <= limits.max_kl:
        return line
    p = mcnemar(moved.further, moved.closer)
    if p >= level:
        return line
    text = f"KL to fp16 is {moved.ratio:.1f} times what it was (p = {p:.2g})"
    return replace(line, faults=(*line.faults, Fault(Kind.KL, text)))


def _notes(before: Cells, now: Cells) -> Iterable[str]:
    """What differs and is not judged."""
    shared = before.keys() & now.keys()
    for name in SETTINGS:
        old, new = (
            sorted(
                {str(getattr(one, name)) or "none" for key in shared for one in side[key].values()}
            )
            for side in (before, now)
        )
        if old != new:
            yield f"{name.replace('_', ' ')}: {', '.join(new)}; in the baseline {', '.join(old)}"
    files = sum(
        before[key][sample].images != now[key][sample].images
        for key in shared
        for sample in before[key].keys() & now[key].keys()
    )
    if files:
        yield f"image files with other bytes: {files} samples"
    if new_cells := now.keys() - before.keys():
        methods = sorted({key.method for key in new_cells})
        yield f"not in the baseline: {len(new_cells)} cells, of {', '.join(methods)}"
