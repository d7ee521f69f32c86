"""Methods that write down when they answer, one of which waits in the middle of every job.

Run by test_streaming.py in two processes, as: python watched.py MODEL_FOLDER DATA_ROOT FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import DynamicCache

from kvbench.evaluation import choices
from kvbench.evaluation.choices import MethodChoice
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate

PATIENCE = 60.0


@dataclass(frozen=True)
class Watched:
    """A peer; FOLDER/answers has its name and process for every batch that it answers.

    With `waits` it then answers no more before FOLDER/open exists, so its job can't end.
    """

    label: ClassVar[str] = "watched"
    paper: ClassVar[str] = "-"
    splits_prompt: ClassVar[bool] = False
    concatenates: ClassVar[bool] = False
    name: str
    folder: Path
    waits: bool = False

    def cache(self, model: Any, protocol: str) -> DynamicCache:
        return DynamicCache(config=model.config)

    def nbytes(self, cache: DynamicCache) -> int:
        with (self.folder / "answers").open("a") as file:
            file.write(f"{self.name} {os.getpid()}\n")
        deadline = time.monotonic() + PATIENCE
        while self.waits and not (self.folder / "open").exists():
            if time.monotonic() > deadline:
                raise RuntimeError("nobody has opened the gate")
            time.sleep(0.01)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def answers(folder: Path) -> list[tuple[str, int]]:
    """Who answered a batch, in which process, in this order."""
    lines = (folder / "answers").read_text().splitlines()
    return [(name, int(pid)) for name, pid in map(str.split, lines)]


def request(model: str, data: str, folder: Path, **changes: Any) -> EvalRequest:
    """Two samples, fp16 and two watched methods: the job of a sample stops at its third row."""
    watched = (Watched("swift", folder), Watched("patient", folder, waits=True))
    fields: dict[str, Any] = {
        "methods": (
            *choices.choose_methods("fp16"),
            *(MethodChoice(method.name, method) for method in watched),
        ),
        "models": choices.choose_models(f"tiny={model}"),
        "tasks": choices.choose_tasks("oe"),
        "protocols": ("quantized_prefill",),
        "out": folder / "run",
        "data_root": Path(data),
        "device": "cpu",
        "limit": 2,
        "max_new_tokens": 4,
    }
    return EvalRequest(**fields | changes)


if __name__ == "__main__":
    evaluate(request(sys.argv[1], sys.argv[2], Path(sys.argv[3]), workers=2), Silent())
