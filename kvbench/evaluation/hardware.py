"""Where a run computes, and out-of-memory as a result instead of an end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvbench.models import AUTO_MAP

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry


def wants_gpus(device: str) -> bool:
    """Whether a run takes GPUs as it finds them; "cuda:1" is one that the user chose."""
    return device in ("auto", "cuda", AUTO_MAP)


def load(entry: ModelEntry, device: str, dtype: str) -> LoadedModel:
    """Load a model; "auto" means CUDA if there is any, and the entry's own dtype.

    Raises:
        UserError: the checkpoint or the device is not there.
    """
    import torch

    from kvbench.models.load import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(entry, device, None if dtype == "auto" else dtype)


def check_available(entry: ModelEntry) -> None:
    """Check that a checkpoint is complete without loading it; a bundled model is taken to be.

    Raises:
        UserError: it is not on this machine, or files are missing or damaged.
    """
    from kvbench.models.folders import checkpoint_folder

    if entry.folder is not None or entry.loader is None:
        checkpoint_folder(entry)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that host or device memory ran out."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError))
