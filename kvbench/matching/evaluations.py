"""What settings are measured on and then compared by: the same whatever the evaluation is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from kvbench.cache import Calibration
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.matching.measure import Prompt
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class Ground:
    """A model and the prompts to measure storage with.

    Attributes:
        loaded: The model.
        statistics: What methods are calibrated with.
        prompts: A few of the evaluation's.
        conditions: Fields of the evaluation's tables that say where these sizes hold.
    """

    loaded: LoadedModel
    statistics: Calibration | None
    prompts: Sequence[Prompt]
    conditions: Mapping[str, str | int] = field(default_factory=dict)


class Evaluation(Protocol):
    """Prompts and a run of some methods; its methods' fields that differ from defaults are kept."""

    @property
    def methods(self) -> tuple[MethodChoice, ...]:
        """Methods to bring to a size."""

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """Models, each of which has settings of its own."""

    @property
    def out(self) -> Path:
        """Folder of the rows and of the settings."""

    @property
    def rows(self) -> str:
        """Name of the rows' file."""

    def ground(self, entry: ModelEntry, progress: Progress) -> Ground:
        """Load a model and the prompts.

        Raises:
            UserError: the model or the data can't be used.
        """

    def run(self, entry: ModelEntry, methods: tuple[MethodChoice, ...], progress: Progress) -> None:
        """Add the rows of these methods, the 16-bit cache among them, that the folder lacks.

        Raises:
            UserError: a method, the model, the data or the folder can't be used.
        """


def evenly(count: int, wanted: int) -> list[int]:
    """Places of `wanted` of `count` items, at equal distances from the first on."""
    step = max(count / wanted, 1)
    return list(dict.fromkeys(int(i * step) for i in range(min(wanted, count))))
