"""A planted bug is caught: one method's zero point is off by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvbench.cache import Affine
from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate
from kvbench.methods import akvq_vl, rtn
from kvbench.report.regression import Limits, check, comparison_text, read_outcomes
from kvbench.report.regression.outcomes import Outcome
from kvbench.report.regression.result import Kind

Answers = Callable[..., list[Outcome]]


class OffByOne(Affine):
    """Reads with a zero point that is one too large."""

    def decode(self, packed: Any, dtype: torch.dtype) -> torch.Tensor:
        codes, scale, zero = packed
        return super().decode((codes, scale, zero + 1), dtype)


@pytest.fixture
def answers(tmp_path: Path) -> Answers:
    """Outcomes of a run on few samples, in a folder of the given name."""

    def run(name: str, methods: str, model: str, samples: int, **more: Any) -> list[Outcome]:
        request = EvalRequest(
            methods=choices.choose_methods(methods),
            models=choices.choose_models(model),
            tasks=("sc",),
            protocols=("exact_prefill",),
            out=tmp_path / name,
            limit=samples,
            batch=samples,
            device="cpu",
            max_new_tokens=4,
            **more,
        )
        evaluate(request, Silent())
        return read_outcomes(request.out)

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve samples of one task."""
    from kvbench.tasks.minimile import make

    make(tmp_path / "data", samples=12, folders=("StateChange",))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("module", "broken", "sound"),
    [(rtn, "rtn_int4", "kivi"), (akvq_vl, "akvq_vl[recent=8]", "rtn_int2")],
)
def test_kl_shows_the_bug_in_seconds(
    answers: Answers,
    pictures: Path,
    tiny_llava_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    broken: str,
    sound: str,
) -> None:
    """On a random model that never answers right, and for no method but the one with the bug."""
    setting = (f"fp16,{broken},{sound}", f"tiny={tiny_llava_folder}", 12)
    before = answers("before", *setting, data_root=pictures)
    again = answers("again", *setting, data_root=pictures)
    assert check(again, before, Limits(max_kl=2)).ok
    monkeypatch.setattr(module, "Affine", OffByOne)
    planted = answers("planted", *setting, data_root=pictures)
    methods = check(planted, before, Limits(max_kl=2)).methods
    faults = {method.mean.key.method: set(method.faults) for method in methods}
    assert faults == {"fp16": set(), sound: set(), broken: {Kind.KL}}


@pytest.mark.slow
def test_accuracy_shows_the_bug(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the bundled model, which answers this task right with a sound 2-bit cache."""
    setting = ("rtn_int2", "smol_llava", 10)
    before = answers("before", *setting)
    monkeypatch.setattr(rtn, "Affine", OffByOne)
    result = check(answers("planted", *setting), before, Limits())
    assert not result.ok
    assert "rtn_int2, exact_prefill: mean dropped by" in comparison_text(result)
