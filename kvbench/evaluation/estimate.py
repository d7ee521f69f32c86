"""How long a grid will take, from the seconds that samples of it took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow

if TYPE_CHECKING:
    from kvbench.evaluation.samples import Cell

_Place = tuple[str | None, ...]
_FALLBACKS = ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3), (0, 1), (0, 2, 3), (0, 2), (0, 3), (0,))
"""Which of (model, method, protocol, task) a median holds for; the first that was measured."""


@dataclass(frozen=True)
class Estimate:
    """One model's share of a grid.

    Attributes:
        model: Its name.
        total: Samples of the grid: every method, protocol and task counts.
        left: Samples without an answer yet.
        measured: Answered samples that the estimate rests on.
        borrowed: Those left in cells where none was measured: the nearest cell's median stands in.
        seconds: What the samples left take on one device, without loading the weights.
    """

    model: str
    total: int
    left: int
    measured: int
    borrowed: int
    seconds: float


def estimates(
    request: EvalRequest, cells: Mapping[str, Cell], rows: Iterable[SampleRow]
) -> list[Estimate]:
    """Estimate each model's time: samples left times the median seconds of measured ones.

    Rows of other data or another batch size are left out; those of another version of kvbench were
    measured, but will be answered again.

    Args:
        request: The grid.
        cells: Its tasks.
        rows: What was measured, of the same kind of device.

    Raises:
        UserError: a model has no measured sample.
    """
    mine = [
        row
        for row in rows
        if row.status == "ok"
        and row.seconds
        and row.batch == request.batch
        and row.task in cells
        and row.dataset == cells[row.task].dataset
    ]
    seconds: dict[_Place, list[float]] = defaultdict(list)
    answered: dict[_Place, set[int]] = defaultdict(set)
    for row in mine:
        place = row.model, row.method, row.protocol, row.task
        for kept in _FALLBACKS:
            seconds[_masked(place, kept)].append(sum(row.seconds.values()))
        if row.version == kvbench.__version__:
            answered[place].add(row.sample_id)
    return [_of_model(entry.name, request, cells, seconds, answered) for entry in request.models]


def estimate_text(found: Sequence[Estimate], workers: int) -> str:
    """One line a model, then the sum, in hours on one device and shared by `workers`."""
    lines = [
        f"{one.model}: {one.left} of {one.total} samples left, about {_hours(one.seconds)} from "
        f"the medians of {one.measured} measured samples" + _borrowed(one)
        for one in found
    ]
    everything = sum(one.seconds for one in found)
    lines.append(f"all: about {_hours(everything)} on one device, plus loading each model")
    if workers > 1:
        lines.append(f"shared by {workers} workers: about {_hours(everything / workers)}")
    return "\n".join(lines)


def _of_model(
    model: str,
    request: EvalRequest,
    cells: Mapping[str, Cell],
    seconds: Mapping[_Place, Sequence[float]],
    answered: Mapping[_Place, set[int]],
) -> Estimate:
    total = left = borrowed = 0
    duration = 0.0
    measured = seconds.get((model, None, None, None), ())
    if not measured:
        raise UserError(
            f"{model} has no measured samples in {request.out} with --batch {request.batch}: "
            f"answer some first, with --limit 2 --out {request.out}"
        )
    for place in _places(model, request):
        chosen = {sample.sample_id for sample in cells[str(place[3])].samples}
        missing = len(chosen - answered.get(place, set()))
        total, left = total + len(chosen), left + missing
        known = next(_masked(place, kept) for kept in _FALLBACKS if _masked(place, kept) in seconds)
        duration += missing * median(seconds[known])
        borrowed += missing if known != place else 0
    return Estimate(model, total, left, len(measured), borrowed, duration)


def _places(model: str, request: EvalRequest) -> Iterator[_Place]:
    for choice in request.methods:
        for protocol in request.protocols:
            for task in request.tasks:
                yield model, choice.spec, protocol, task


def _masked(place: _Place, kept: Sequence[int]) -> _Place:
    return tuple(part if index in kept else None for index, part in enumerate(place))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h"


def _borrowed(one: Estimate) -> str:
    if not one.borrowed:
        return ""
    return f"; {one.borrowed} of them where none was measured yet, as long as in the nearest cell"
