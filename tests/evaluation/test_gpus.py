"""Several GPUs: the answers of one. Which GPU a local worker gets is tested without any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.errors import UserError
from kvbench.evaluation.choices import MethodChoice
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.run import evaluate
from kvbench.evaluation.workers_local import LocalExecutor
from kvbench.models import AUTO_MAP, load

Grid = Callable[..., EvalRequest]
Evaluated = Callable[..., list[SampleRow]]

METHODS = "fp16,rtn_int2_wht,smoothquant,kivi,skvq[window=8],akvq_vl[recent=64]"
needs_two = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
WITNESS = """
import os
from dataclasses import dataclass
from pathlib import Path
from kvbench.cache import Needs
from kvbench.registry import METHODS

@dataclass(frozen=True)
class Witness:
    needs = Needs()
    label = "witness"
    folder: str

    def layer(self, spec, calibration):
        (Path(self.folder) / os.environ["CUDA_VISIBLE_DEVICES"]).touch()
        return METHODS.get("rtn_int2").layer(spec, calibration)
"""


@pytest.mark.parametrize(
    ("options", "visible", "shares"),
    [
        ({"workers": 2}, "", ["0", "1"]),
        ({"workers": 6}, "", ["0", "1", "2", "3", "0", "1"]),
        ({"workers": 3}, "2,5,6,7", ["2", "5", "6"]),
        ({"workers": 2}, "GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a", "GPU-b"]),
        ({"workers": 2, "gpus_per_worker": 2}, "", ["0,1", "2,3"]),
        ({"workers": 2, "device": AUTO_MAP}, "", ["0,1", "2,3"]),
        ({"workers": 3, "device": AUTO_MAP}, "", ["0", "1", "2"]),
        ({"workers": 2, "device": "cuda:3"}, "", [None, None]),
        ({"workers": 2, "device": "cpu"}, "", [None, None]),
    ],
)
def test_gpus_of_each_worker(
    grid: Grid,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    visible: str,
    shares: list[str | None],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    executor = LocalExecutor(grid(**{"device": "auto"} | options))
    assert executor._shares == shares


def test_more_gpus_than_there_are(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="--gpus-per-worker is 5, but this machine has 4 GPUs"):
        LocalExecutor(grid(device="auto", gpus_per_worker=5))


def same_answers(rows: list[SampleRow], expected: list[SampleRow]) -> None:
    """Kernels sum in one order everywhere, so answers are the same; KL up to rounding."""
    assert {row.key for row in rows} == {row.key for row in expected}
    twins = {row.key: row for row in expected}
    for row in rows:
        twin = twins[row.key]
        for name in ("status", "answer", "correct", "cache_bytes", "packed_tokens_read"):
            assert getattr(row, name) == getattr(twin, name), (row.method, name)
        if row.kl_mean is not None:
            assert row.kl_mean == pytest.approx(twin.kl_mean, rel=1e-2, abs=1e-3)


def split(device: str) -> dict[str, str]:
    """The tiny LLaVA on two GPUs: all but the last two layers on the first."""
    stack = "model.language_model"
    first = [f"{stack}.embed_tokens", f"{stack}.rotary_emb", f"{stack}.layers.0"]
    first += ["model.vision_tower", "model.multi_modal_projector"]
    second = [f"{stack}.layers.1", f"{stack}.layers.2", f"{stack}.norm", "lm_head"]
    return dict.fromkeys(first, "cuda:0") | dict.fromkeys(second, "cuda:1")


@pytest.fixture
def options(private_cache: Path) -> dict[str, Any]:
    return {
        "methods": METHODS,
        "protocols": ("quantized_prefill", "exact_prefill"),
        "dtype": "float32",
        "limit": 3,
    }


class TestTwoGPUs:
    pytestmark = needs_two

    def test_a_model_on_both(
        self,
        evaluated: Evaluated,
        options: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = evaluated(**options, device="cuda:0", out=tmp_path / "one")
        monkeypatch.setattr(load, "_device_map", split)
        same_answers(evaluated(**options, device=AUTO_MAP, out=tmp_path / "two"), expected)

    def test_the_second_one(
        self, evaluated: Evaluated, options: dict[str, Any], tmp_path: Path
    ) -> None:
        expected = evaluated(**options, device="cuda:0", out=tmp_path / "one")
        same_answers(evaluated(**options, device="cuda:1", out=tmp_path / "two"), expected)

    def test_a_worker_on_each(
        self,
        grid: Grid,
        evaluated: Evaluated,
        options: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        expected = evaluated(**options, device="cuda:0", out=tmp_path / "one")
        rows = evaluated(**options, device="auto", workers=2, out=tmp_path / "two")
        same_answers(rows, expected)
        (tmp_path / "witness_method.py").write_text(WITNESS)
        monkeypatch.syspath_prepend(tmp_path)
        import witness_method  # type: ignore[import-not-found]

        (tmp_path / "seen").mkdir()
        witness = MethodChoice("witness", witness_method.Witness(str(tmp_path / "seen")))
        request = grid(device="auto", workers=2, out=tmp_path / "witnessed")
        evaluate(dataclasses.replace(request, methods=(witness,)), Silent())
        seen = {path.name for path in (tmp_path / "seen").iterdir()}
        assert len(seen) == 2 and all("," not in name for name in seen)
