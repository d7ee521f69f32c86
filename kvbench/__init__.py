"""kvbench: what KV-cache quantization costs in accuracy and gives back in memory and speed.

The names in `__all__` are the Python API; docs/python-api.md shows them at work. Importing kvbench
imports neither torch nor transformers: a name brings its module when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# A checkout keeps methods/, tasks/ and kernels/ beside this directory, a wheel inside it.
_here = _Path(__file__).resolve().parent
if not (_here / "methods").is_dir() and (_here.parent / "methods").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from kvbench.api import compare, evaluate, measure_efficiency
    from kvbench.cache import (
        Calibration,
        ForeignCache,
        KVQuantizer,
        cache_argument,
        load_calibration,
        quantized_cache,
    )
    from kvbench.efficiency.rows import EfficiencyRow
    from kvbench.errors import UserError
    from kvbench.evaluation.rows import SampleRow
    from kvbench.models.zoo import ModelEntry
    from kvbench.registry import METHODS, MODELS, TASKS, Registry
    from kvbench.report.regression import Comparison
    from kvbench.tasks.base import Task

__all__ = [
    "METHODS",
    "MODELS",
    "TASKS",
    "Calibration",
    "Comparison",
    "EfficiencyRow",
    "ForeignCache",
    "KVQuantizer",
    "ModelEntry",
    "Registry",
    "SampleRow",
    "Task",
    "UserError",
    "__version__",
    "cache_argument",
    "compare",
    "evaluate",
    "load_calibration",
    "measure_efficiency",
    "quantized_cache",
]

_HOMES = {
    "api": ("compare", "evaluate", "measure_efficiency"),
    "cache": (
        "Calibration",
        "ForeignCache",
        "KVQuantizer",
        "cache_argument",
        "load_calibration",
        "quantized_cache",
    ),
    "efficiency.rows": ("EfficiencyRow",),
    "errors": ("UserError",),
    "evaluation.rows": ("SampleRow",),
    "models.zoo": ("ModelEntry",),
    "registry": ("METHODS", "MODELS", "TASKS", "Registry"),
    "report.regression": ("Comparison",),
    "tasks.base": ("Task",),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562), and keep it."""
    for module, names in _HOMES.items():
        if name in names:
            globals()[name] = getattr(_import_module(f"kvbench.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All names, imported yet or not."""
    return sorted({*globals(), *__all__})
