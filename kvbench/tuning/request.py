"""What a search is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kvbench.errors import UserError
from kvbench.evaluation.request import at_least, check_folders, check_hardware

if TYPE_CHECKING:
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.zoo import ModelEntry

Objective = Literal["kl", "accuracy"]


@dataclass(frozen=True)
class TuneRequest:
    """Models to search a table for, one after the other.

    Attributes:
        method: A method that takes a choice for each layer.
        models: Entries of the zoo or of local folders, each name once.
        tasks: Names of tasks; prompts are drawn evenly from them.
        out: Folder of the results; each model gets one of its name in it, which is continued.
        bits: Budget in stored bits an element, metadata and exact tokens counted.
        nbytes: Budget in mean bytes of a prompt's cache instead.
        objective: "kl" (mean KL(fp16 || method) over the 16-bit answers' tokens) or "accuracy".
        protocol: What prompt queries attend to.
        data_root: Folder with MileBench's layout; None is minimile's calibration split, which no
            task scores.
        samples: Prompts.
        trials: Tables that the model is run with.
        clusters: Groups of layers that share a choice, at most.
        seed: Which samples, and the search's randomness.
        max_new_tokens: Longest answer.
        device: As in `EvalRequest`.
        dtype: As in `EvalRequest`.

    Raises:
        UserError: A value is out of range, or a folder is missing.
    """

    method: MethodChoice
    models: tuple[ModelEntry, ...]
    tasks: tuple[str, ...]
    out: Path
    bits: float | None = 4.25
    nbytes: int | None = None
    objective: Objective = "kl"
    protocol: str = "quantized_prefill"
    data_root: Path | None = None
    samples: int = 12
    trials: int = 40
    clusters: int = 6
    seed: int = 0
    max_new_tokens: int = 16
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        for name in ("samples", "trials", "clusters", "max_new_tokens"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if (self.bits is None) == (self.nbytes is None):
            raise UserError("a search needs one budget: give --bits or --bytes")
        if not 0 < (self.bits or self.nbytes or 0) < math.inf:
            raise UserError("the budget must be a positive number: correct --bits or --bytes")
        check_hardware(self.device, self.dtype)
        check_folders(self.out, self.data_root)

    def budget(self, nbytes_a_bit: float) -> float:
        """The budget in bits, where one bit an element takes so many bytes."""
        return self.bits if self.bits is not None else (self.nbytes or 0) / nbytes_a_bit
