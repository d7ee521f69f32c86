"""What a comparison finds: lines of a table, what is wrong with them, and what was let pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from kvbench.errors import UserError
from kvbench.evaluation.statistics import Interval, Paired
from kvbench.report.regression.outcomes import CellKey

MEAN = "mean"
"""Stands where a task does, for the mean over a method's tasks."""


class Kind(StrEnum):
    """What can be wrong."""

    MISSING = "missing"
    DATA = "other data"
    PROMPT = "other prompts"
    IMAGES = "other images"
    COUNT = "other number of samples"
    STATUS = "failed"
    DROP = "dropped"
    KL = "further from fp16"
    BITS = "more bits"
    BYTES = "more bytes"


@dataclass(frozen=True)
class Limits:
    """What is let pass.

    Attributes:
        max_drop: Points of accuracy that a task or a mean may lose.
        max_growth: Percent that bits and bytes may grow by, for methods whose plan looks at
            activations: another processor's rounding may move a token to another precision.
        any_images: Whether image files with other bytes will do, for generated data: another
            release of an image library may compress the same picture in another way.
        max_kl: Factor by which a method's KL divergence from the 16-bit cache may grow, as the
            geometric mean over samples; None judges right and wrong answers only. It shows bugs
            that a few samples' accuracy can't.
        alpha: Chance of one false drop among all tasks and means together.

    Raises:
        UserError: `max_drop` is no number of points, or `max_kl` no factor.
    """

    max_drop: float = 1.0
    max_growth: float = 0.5
    any_images: bool = False
    max_kl: float | None = None
    alpha: float = 0.05

    def __post_init__(self) -> None:
        """Check what users set."""
        if not 0 <= self.max_drop <= 100:  # NaN, too, would let everything pass
            raise UserError(f"--max-drop is {self.max_drop:g}: give points from 0 to 100")
        if self.max_kl is not None and not self.max_kl >= 1:
            raise UserError(f"--max-kl is {self.max_kl:g}: give a factor of at least 1")


@dataclass(frozen=True)
class Fault:
    """One thing that is worse, as a sentence without its subject."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Divergence:
    """KL from the 16-bit cache, now against before, on the same samples."""

    further: int
    """Samples on which it grew; on `closer` it shrank."""
    closer: int
    log_ratio: float
    """Mean of log(now / before)."""

    @property
    def ratio(self) -> float:
        """Geometric mean of now / before."""
        return math.exp(self.log_ratio)


@dataclass(frozen=True)
class Line:
    """A cell of both runs, or the mean of a method's cells; accuracies are shares, 0 to 1."""

    key: CellKey
    counts: Paired
    """Over the samples that both runs scored, tasks pooled."""
    before: float | None = None
    now: float | None = None
    bits: tuple[float | None, float | None] = (None, None)
    nbytes: tuple[float | None, float | None] = (None, None)
    divergence: Divergence | None = None
    faults: tuple[Fault, ...] = ()
    interval: Interval | None = None
    p: float = 1.0
    detectable: float | None = None
    """Smallest drop that these samples tell from chance, beside the answers they gained."""

    @property
    def difference(self) -> float | None:
        """Accuracy now less before."""
        return None if self.now is None or self.before is None else self.now - self.before


@dataclass(frozen=True)
class Method:
    """One method under one protocol: its mean, and its tasks."""

    mean: Line
    tasks: tuple[Line, ...]

    @property
    def faults(self) -> dict[Kind, list[Line]]:
        """Lines by what is wrong with them; of drops the mean comes first."""
        found: dict[Kind, list[Line]] = {}
        for line in (self.mean, *self.tasks):
            for fault in line.faults:
                found.setdefault(fault.kind, []).append(line)
        return found


@dataclass(frozen=True)
class Comparison:
    """A run against its baseline."""

    methods: tuple[Method, ...]
    limits: Limits
    level: float
    """At which each single test is read, so that all together hold `Limits.alpha`."""
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing is worse."""
        return not any(method.faults for method in self.methods)
