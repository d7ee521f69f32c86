"""Answers a request in one process; OUT/resident.json: bytes of memory held after each sample.

Run by test_soak.py, as: python soak.py MODEL_FOLDER DATA_ROOT OUT METHODS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate

PAGE = os.sysconf("SC_PAGE_SIZE")


class Meter(Silent):
    """Reads the resident set whenever all methods have answered a sample."""

    def __init__(self, methods: int) -> None:
        self.methods, self.answers = methods, 0
        self.resident: list[int] = []

    def advance(self) -> None:
        self.answers += 1
        if self.answers % self.methods == 0:
            self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)


def main(model: str, data: str, out: str, methods: str) -> None:
    chosen = choices.choose_methods(methods)
    meter = Meter(len(chosen))
    request = EvalRequest(
        methods=chosen,
        models=choices.choose_models(f"tiny={model}"),
        tasks=choices.choose_tasks("tqa"),
        protocols=("quantized_prefill",),
        out=Path(out),
        data_root=Path(data),
        device="cpu",
        max_new_tokens=3,
    )
    evaluate(request, meter)
    (Path(out) / "resident.json").write_text(json.dumps(meter.resident))


if __name__ == "__main__":
    main(*sys.argv[1:])
