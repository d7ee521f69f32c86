"""What to examine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.evaluation.choices import MethodChoice, existing_folder
from kvbench.evaluation.request import check_hardware

if TYPE_CHECKING:
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class DoctorRequest:
    """What to examine.

    Attributes:
        methods: Methods to look at.
        model: Model to run them on; None loads none.
        data_root: Folder with MileBench's layout; None is the generated data.
        device: As in `EvalRequest`; so is `dtype`.
        dtype: Type of weights and activations.

    Raises:
        UserError: The device or the dtype is unknown, or the data root is no folder.
    """

    methods: tuple[MethodChoice, ...]
    model: ModelEntry | None
    data_root: Path | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        check_hardware(self.device, self.dtype)
        existing_folder("data root", self.data_root)
