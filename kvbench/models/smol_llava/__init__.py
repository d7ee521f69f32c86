"""The bundled model: SmolLM2-135M-Instruct with a small vision tower, as a LLaVA model.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load", "load_language"]


def load(device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any, str]:
    """The model, its processor and its revision; offline, seconds after the first time.

    Args:
        device: where the model goes.
        dtype: of its weights; bfloat16 if None.

    Returns:
        `LlavaForConditionalGeneration` in eval mode, `LlavaProcessor`, and a text that changes
        with the weights.

    Raises:
        UserError: the trained weights or those of SmolLM2 are missing.
    """
    from kvbench.models.smol_llava.loading import load_merged

    return load_merged(device, dtype)


def load_language(device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any, str]:
    """SmolLM2-135M-Instruct itself, its tokenizer and its revision; arguments as of `load`.

    Raises:
        UserError: the weights are not installed.
    """
    from kvbench.models.smol_llava.loading import load_base

    return load_base(device, dtype)
