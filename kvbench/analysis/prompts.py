"""The prompts that a model is looked into with, drawn evenly from the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvbench.analysis.request import AnalysisRequest
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.registry import TASKS

if TYPE_CHECKING:
    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """One prompt of T tokens and where it comes from."""

    task: str
    sample_id: int
    dataset: str
    inputs: ModelInputs


def prompts(loaded: LoadedModel, request: AnalysisRequest) -> Iterator[Prompt]:
    """The request's prompts as a model is asked them.

    Raises:
        UserError: the data can't be read or made, or a prompt doesn't fit the model.
    """
    share = -(-request.samples // len(request.tasks))
    left = request.samples
    for name in request.tasks:
        root = request.data_root or TASKS.get(name).calibration_root(share)
        cell = read_cell(name, root, share, request.seed)
        for sample in cell.samples[:left]:
            inputs = encoded(loaded, [ask(loaded, cell.task, sample)])
            yield Prompt(name, sample.sample_id, cell.dataset, inputs)
        left = max(left - len(cell.samples), 0)
