"""kvbench: what KV-cache quantization costs in accuracy and gives back in memory and speed."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A checkout keeps methods/, tasks/ and kernels/ beside this directory, a wheel inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "methods").is_dir() and (_here.parent / "methods").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from kvbench.cache import quantized_cache

__all__ = ["__version__", "quantized_cache"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when the cache is asked for."""
    if name == "quantized_cache":
        from kvbench.cache import quantized_cache

        return quantized_cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
