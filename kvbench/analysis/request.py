"""What an analysis is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.evaluation.choices import existing_folder
from kvbench.evaluation.request import at_least, check_folders, check_hardware

if TYPE_CHECKING:
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class AnalysisRequest:
    """Models to look into, the prompts to do it with, and where tables and figures go.

    Attributes:
        models: Entries of the zoo or of local folders, each name once.
        methods: Methods whose error is taken apart by layer; others' own caches are left out.
        detector: Method whose plan picks the pivots that are held against attention.
        tasks: Names of tasks; prompts are drawn evenly from them.
        out: Folder of the results; each model gets one of its name in it.
        data_root: Folder with MileBench's layout; None is minimile's calibration split, which no
            task scores.
        samples: Prompts.
        seed: Which samples.
        near: Distance in tokens below which attention is local and tells no kinds of tokens apart.
        whole_prompt: Prompts on which each layer alone is also stored for all prompt queries; that
            takes a run of the model for each layer and method.
        device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N".
        dtype: Type of weights and activations; "auto" is the model entry's own.
        calibration: Folder written by `kvbench calibrate`; None calibrates where a method needs it.

    Raises:
        UserError: A value is out of range, or a folder is missing.
    """

    models: tuple[ModelEntry, ...]
    methods: tuple[MethodChoice, ...]
    detector: MethodChoice
    tasks: tuple[str, ...]
    out: Path
    data_root: Path | None = None
    samples: int = 12
    seed: int = 0
    near: int = 16
    whole_prompt: int = 0
    device: str = "auto"
    dtype: str = "auto"
    calibration: Path | None = None

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        at_least("samples", self.samples, 1)
        at_least("seed", self.seed, 0)
        at_least("near", self.near, 0)
        at_least("whole_prompt", self.whole_prompt, 0)
        check_hardware(self.device, self.dtype)
        check_folders(self.out, self.data_root)
        existing_folder("calibration folder", self.calibration)
