"""The bundled model: SmolLM2-135M-Instruct with a small vision tower, as a LLaVA model.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.models.smol_llava.load import load, merged_folder

__all__ = ["load", "merged_folder"]


def __getattr__(name: str) -> Any:
    """Import the loader, and torch with it, when it is first asked for."""
    if name in __all__:
        from kvbench.models.smol_llava import load as loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
