"""One try, from a request in a file to a result in another, on the CPU with a tiny model."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.efficiency.engine import StaticEngine
from kvbench.efficiency.request import TrialRequest, TrialResult
from kvbench.efficiency.trial import main, run_trial
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError


@pytest.fixture
def request_of(tiny_llava_folder: Path) -> TrialRequest:
    return TrialRequest(
        model=f"tiny={tiny_llava_folder}",
        method="akvq_vl[recent=8,pivots=3]",
        workload=Workload(44, 32, 6, batch=3),
        runner="engine",
        device="cpu",
        dtype="float32",
        prefill_rows=2,
    )


def test_measures_times_bytes_and_reads(request_of: TrialRequest) -> None:
    result = run_trial(request_of)
    assert result.status == "ok"
    assert result.weights == "real"
    assert result.path.startswith("fused")
    assert len(result.tpot_s) == 5
    assert all(seconds > 0 for seconds in result.tpot_s)
    assert result.ttft_s is not None
    assert result.total_s is not None
    assert len(result.prompts_s) == 2  # two rows, and one
    assert all(seconds > 0 for seconds in result.prompts_s)
    assert sum(result.prompts_s) == pytest.approx(result.ttft_s)
    assert result.decode_s is not None
    assert result.ttft_s + result.decode_s == pytest.approx(result.total_s)
    assert result.packed_tokens_read
    assert result.cache_bytes
    assert result.bytes_per_step
    assert result.weight_bytes
    assert result.vision_bytes
    assert result.peak_torch is None  # there is no allocator to ask on the CPU


def test_weights_are_counted_once(request_of: TrialRequest, tiny_llava_folder: Path) -> None:
    result = run_trial(request_of)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tiny_llava_folder)
    numbers = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.buffers())
    assert result.weight_bytes is not None
    assert result.vision_bytes is not None
    extra = result.weight_bytes + result.vision_bytes - 4 * numbers
    assert 0 <= extra <= 8 * 64  # buffers of whole numbers take eight bytes


def test_every_shape_runs_before_the_clock_does(
    request_of: TrialRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    prefill = StaticEngine.prefill

    def recorded(engine: StaticEngine, first_row: int, prompts: Any) -> None:
        rows.append((first_row, len(prompts["input_ids"])))
        prefill(engine, first_row, prompts)

    monkeypatch.setattr(StaticEngine, "prefill", recorded)
    run_trial(request_of)
    assert rows == [(0, 2), (0, 1), (0, 2), (2, 1)]


@pytest.mark.parametrize(
    ("method", "steady", "status"),
    [
        ("akvq_vl[recent=8,pivots=3]", True, "oom"),
        ("akvq_vl[recent=8,pivots=3]", False, "ok"),
        ("skvq[group_size=16]", True, "ok"),  # eager: its cache has to grow
    ],
)
def test_memory_given_back_while_the_clock_runs(
    request_of: TrialRequest,
    method: str,
    steady: bool,
    status: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    retries = itertools.count()
    monkeypatch.setattr("kvbench.efficiency.engine_run._retries", lambda device: next(retries))
    result = run_trial(replace(request_of, method=method, steady=steady))
    assert result.status == status
    assert ("give cached memory back" in result.detail) == (status == "oom")


def test_a_peer_has_no_engine(request_of: TrialRequest) -> None:
    with pytest.raises(UserError, match="brings its own cache"):
        run_trial(replace(request_of, method="hf_dynamic"))


def test_a_probe_measures_nothing(request_of: TrialRequest) -> None:
    result = run_trial(replace(request_of, probe=True))
    assert result.status == "ok"
    assert result.tpot_s == ()


def test_packed_methods_take_fewer_bytes(request_of: TrialRequest) -> None:
    exact = run_trial(replace(request_of, method="fp16"))
    packed = run_trial(replace(request_of, method="rtn_int2"))
    assert exact.cache_bytes is not None
    assert packed.cache_bytes is not None
    assert packed.cache_bytes < exact.cache_bytes / 3
    assert exact.packed_tokens_read == 0


def test_methods_with_statistics_and_eager_ones_run(request_of: TrialRequest) -> None:
    assert run_trial(replace(request_of, method="smoothquant")).path.startswith("fused")
    eager = run_trial(replace(request_of, method="skvq[group_size=16]"))
    assert eager.status == "ok"
    assert eager.path == "eager: keys are stored before rotary embedding"


def test_vision_tokens_must_be_whole_images(request_of: TrialRequest) -> None:
    with pytest.raises(UserError, match="whole images of 16 tokens"):
        run_trial(replace(request_of, workload=Workload(44, 30, 6)))


def test_runs_from_files(request_of: TrialRequest, tmp_path: Path) -> None:
    request_of.save(tmp_path / "request.json")
    assert main([str(tmp_path / "request.json"), str(tmp_path / "result.json")]) == 0
    result = TrialResult.from_json(json.loads((tmp_path / "result.json").read_text()))
    assert result.status == "ok"
    assert len(result.tpot_s) == 5


def test_bad_requests_are_results(request_of: TrialRequest, tmp_path: Path) -> None:
    replace(request_of, method="no_such_method").save(tmp_path / "request.json")
    assert main([str(tmp_path / "request.json"), str(tmp_path / "result.json")]) == 0
    result = TrialResult.from_json(json.loads((tmp_path / "result.json").read_text()))
    assert result.status == "failed"
    assert "no_such_method" in result.detail
