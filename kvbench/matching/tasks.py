"""Answers to tasks as what settings are measured on and compared by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.evaluation.request import EvalRequest, at_least
from kvbench.matching.evaluations import Ground, evenly

if TYPE_CHECKING:
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.matching.measure import Prompt
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class OnTasks:
    """`kvbench eval` of matched settings.

    Attributes:
        request: Models, methods, tasks and the rest.
        samples: Prompts to measure storage with, drawn evenly from the tasks.

    Raises:
        UserError: A value is out of range.
    """

    request: EvalRequest
    samples: int = 12

    def __post_init__(self) -> None:
        """Check what the request doesn't."""
        at_least("samples", self.samples, 1)

    @property
    def methods(self) -> tuple[MethodChoice, ...]:
        """Methods to bring to a size."""
        return self.request.methods

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """Models of the request."""
        return self.request.models

    @property
    def out(self) -> Path:
        """Folder of the rows."""
        return self.request.out

    @property
    def rows(self) -> str:
        """Name of the rows' file."""
        from kvbench.evaluation.store import SAMPLES

        return SAMPLES

    def ground(self, entry: ModelEntry, progress: Progress) -> Ground:
        """A model, and as many prompts of each task."""
        from kvbench.evaluation.hardware import load
        from kvbench.evaluation.session import calibration

        request = self.request
        loaded = load(entry, request.device, request.dtype)
        statistics = calibration(loaded, request, progress)
        return Ground(loaded, statistics, list(self._prompts(loaded)))

    def run(self, entry: ModelEntry, methods: tuple[MethodChoice, ...], progress: Progress) -> None:
        """Answer the tasks."""
        from kvbench.evaluation.run import evaluate

        evaluate(replace(self.request, models=(entry,), methods=methods), progress)

    def _prompts(self, loaded: LoadedModel) -> Iterator[Prompt]:
        from kvbench.evaluation.samples import ask, encoded, read_cell
        from kvbench.matching.measure import Prompt

        request = self.request
        share = -(-self.samples // len(request.tasks))
        for name in request.tasks:
            cell = read_cell(name, request.data_root, request.limit, request.seed)
            for place in evenly(len(cell.samples), share):
                question = ask(loaded, cell.task, cell.samples[place])
                yield Prompt(name, encoded(loaded, [question]))
