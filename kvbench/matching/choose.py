"""For each budget the setting of a method that comes nearest to it from below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.matching.knobs import Candidate

REACH = 0.1
"""A setting that stays farther below the budget than this share is not of the same size."""
NEAR = 0.01
"""Within this share of the budget two settings count as equally near: the one with fewer changed
fields is taken."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Sized:
    """A setting and the bits an element that it stores."""

    candidate: Candidate
    bits: float


@dataclass(frozen=True)
class Absent:
    """A method that has no setting of the wanted size, and why."""

    name: str
    reason: str


def nearest(name: str, sized: Sequence[Sized], budget: float) -> Sized | Absent:
    """The setting of one method for a budget, or why there is none."""
    below = [one for one in sized if one.bits <= budget + _ROUNDING]
    if not sized:
        return Absent(name, "no setting fits this model's layers")
    if not below:
        smallest = min(one.bits for one in sized)
        return Absent(name, f"stores at least {smallest:.3f} bits")
    best = max(one.bits for one in below)
    if best < budget * (1 - REACH):
        above = min((one.bits for one in sized if one.bits > budget), default=None)
        then = "nothing larger" if above is None else f"then {above:.3f}"
        return Absent(name, f"stores {best:.3f} bits, {then}")
    near = [one for one in below if one.bits >= best - NEAR * budget]
    return min(near, key=lambda one: (one.candidate.changes, -one.bits, one.candidate.choice.spec))


def within_reach(
    sized: Sequence[Sized], budgets: Sequence[float], below: int = 4, above: int = 2
) -> list[Sized]:
    """The settings near any budget by an estimate: worth to be measured."""
    kept: dict[int, Sized] = {}
    for budget in budgets:
        order = sorted(sized, key=lambda one: (abs(one.bits - budget), one.candidate.changes))
        under = [one for one in order if one.bits <= budget][:below]
        over = [one for one in order if one.bits > budget][:above]
        kept |= {id(one): one for one in (*under, *over)}
    return list(kept.values())
