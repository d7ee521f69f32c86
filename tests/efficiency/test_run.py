"""From scenarios to rows with made-up tries: order, resumption, budgets, failures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.efficiency import run as run_module
from kvbench.efficiency import scenario as scenario_module
from kvbench.efficiency.profiles import PROFILES, GPUProfile, Target
from kvbench.efficiency.request import TrialRequest, TrialResult
from kvbench.efficiency.rows import ROW_KIND, TRY_KIND, EfficiencyRow, read_efficiency
from kvbench.efficiency.run import measure
from kvbench.efficiency.scenario import Conditions, Scenario, grid, read_batches, setting
from kvbench.errors import UserError
from kvbench.evaluation.progress import Silent

V100 = Target(PROFILES["v100"], "NVIDIA H100", 64 << 30)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Machine:
    """Answers requests: probes fit up to `limit` rows, full runs up to `truth`."""

    def __init__(self, limit: int, truth: int | None = None) -> None:
        self.limit, self.truth = limit, limit if truth is None else truth
        self.requests: list[TrialRequest] = []
        self.special: dict[int, TrialResult | BaseException] = {}

    def __call__(self, request: TrialRequest, timeout: float, log: Path) -> TrialResult:
        self.requests.append(request)
        batch = request.workload.batch
        special = self.special.get(len(self.requests))
        if isinstance(special, BaseException):
            raise special
        if special is not None:
            return special
        if batch > (self.limit if request.probe else self.truth):
            return TrialResult("oom", "no room")
        if request.probe:
            return TrialResult("ok", peak_nvml=batch << 30)
        return TrialResult("ok", peak_nvml=batch << 30, tpot_s=(0.1,), decode_s=0.1, total_s=0.5)

    @property
    def tried(self) -> list[tuple[int, bool]]:
        return [(request.workload.batch, request.probe) for request in self.requests]


@pytest.fixture
def model(tiny_llava_folder: Path) -> str:
    return f"tiny={tiny_llava_folder}"


@pytest.fixture(autouse=True)
def hints(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the capacity model expects; empty: it has no answer."""
    guesses: list[int] = []

    def capacity(*args: Any) -> Any:
        if not guesses:
            raise UserError("no memory model is known")
        return type("Model", (), {"largest_batch": lambda self, *args: guesses[0]})()

    monkeypatch.setattr(run_module, "model_capacity", capacity)
    return guesses


@pytest.fixture
def conditions(tmp_path: Path) -> Callable[..., Conditions]:
    def make(**changes: Any) -> Conditions:
        given: dict[str, Any] = {"target": V100, "out": tmp_path / "out", "tolerance": 0.0}
        return Conditions(**{**given, **changes})

    return make


def scenarios(model: str, methods: str = "fp16", **changes: Any) -> list[Scenario]:
    return grid(model, methods, **{"input_tokens": 40, "output_tokens": 6, **changes})


def test_search_then_one_full_run(model: str, conditions: Any) -> None:
    machine = Machine(5)
    assert measure(scenarios(model), conditions(), Silent(), machine)
    assert machine.tried == [(1, True), (2, True), (4, True), (8, True), (6, True), (5, True),
                             (5, False)]  # fmt: skip
    (row,) = read_efficiency(conditions().out)
    assert (row.status, row.batch, row.out_of_memory_at, row.tries) == ("ok", 5, 6, 7)
    assert (row.memory, row.memory_limit, row.gpu) == ("emulated", 64 << 30, "v100")
    assert (row.input_tokens, row.vision_tokens, row.output_tokens) == (40, 16, 6)
    assert row.throughput == pytest.approx(5 * 6 / 0.5)
    request = machine.requests[-1]
    assert (request.model, request.memory_limit, request.runner) == (model, 64 << 30, "engine")
    assert request.dtype == row.dtype == "float32"  # the checkpoint's own


def test_a_hint_spares_tries(model: str, conditions: Any, hints: list[int]) -> None:
    hints.append(100)
    machine = Machine(100)
    measure(scenarios(model), conditions(), Silent(), machine)
    assert machine.tried == [(100, True), (101, True), (100, False)]


def test_a_full_run_that_needs_more_steps_down(model: str, conditions: Any) -> None:
    machine = Machine(5, truth=3)
    measure(scenarios(model), conditions(), Silent(), machine)
    assert machine.tried[-3:] == [(5, False), (4, False), (2, False)]
    (row,) = read_efficiency(conditions().out)
    assert (row.status, row.batch, row.out_of_memory_at) == ("ok", 2, 4)


def test_only_the_full_run_of_a_search_must_be_steady(model: str, conditions: Any) -> None:
    machine = Machine(5, truth=1)
    measure(scenarios(model), conditions(), Silent(), machine)
    steady = {
        (request.workload.batch, request.probe): request.steady for request in machine.requests
    }
    assert not any(of for (_, probe), of in steady.items() if probe)
    assert steady[5, False]
    assert not steady[1, False]
    machine = Machine(5)
    measure(scenarios(model, "hf_dynamic"), conditions(), Silent(), machine)
    measure(scenarios(model, batches=[4]), conditions(), Silent(), machine)
    assert not any(request.steady for request in machine.requests)


def test_not_even_one_row(model: str, conditions: Any) -> None:
    measure(scenarios(model), conditions(), Silent(), Machine(0))
    (row,) = read_efficiency(conditions().out)
    assert (row.status, row.batch, row.out_of_memory_at, row.tries) == ("oom", 0, 1, 1)


def test_a_batch_that_was_asked_for(model: str, conditions: Any) -> None:
    machine = Machine(7)
    asked = [*scenarios(model, batches=[7, 8])]
    measure(asked, conditions(), Silent(), machine)
    assert machine.tried == [(7, False), (8, False)]
    fits, large = read_efficiency(conditions().out)
    assert (fits.status, fits.batch, fits.fixed_batch, fits.searched) == ("ok", 7, 7, False)
    assert (large.status, large.batch, large.fixed_batch) == ("oom", 0, 8)


def test_a_crash_is_a_row_and_the_next_row_comes(model: str, conditions: Any) -> None:
    machine, progress = Machine(5), Notes()
    machine.special[3] = TrialResult("failed", "it was killed by SIGSEGV")
    measure(scenarios(model, "fp16,rtn_int2"), conditions(), progress, machine)
    crashed, fine = read_efficiency(conditions().out)
    assert (crashed.status, crashed.batch, crashed.tries) == ("failed", 2, 3)
    assert crashed.detail == "it was killed by SIGSEGV"
    assert (fine.method, fine.status, fine.batch) == ("rtn_int2", "ok", 5)
    assert any("SIGSEGV" in note for note in progress.notes)


def test_peers_run_by_generate(model: str, conditions: Any) -> None:
    machine = Machine(1)
    measure(scenarios(model, "hf_dynamic"), conditions(), Silent(), machine)
    assert {request.runner for request in machine.requests} == {"generate"}


def test_rows_that_are_there_are_not_measured_again(model: str, conditions: Any) -> None:
    measure(scenarios(model), conditions(), Silent(), Machine(3))
    machine = Machine(3)
    measure(scenarios(model, "fp16,rtn_int2"), conditions(), Silent(), machine)
    assert {request.method for request in machine.requests} == {"rtn_int2"}
    assert len(read_efficiency(conditions().out)) == 2


def test_an_interrupted_search_goes_on(model: str, conditions: Any) -> None:
    whole, machine = Machine(21), Machine(21)
    measure(scenarios(model), conditions(out=conditions().out / "whole"), Silent(), whole)
    machine.special[4] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        measure(scenarios(model), conditions(), Silent(), machine)
    again = Machine(21)
    measure(scenarios(model), conditions(), Silent(), again)
    assert machine.tried[:3] + again.tried == whole.tried
    (row,) = read_efficiency(conditions().out)
    assert (row.batch, row.tries) == (21, len(whole.tried))


def test_failed_tries_and_rows_are_tried_again(model: str, conditions: Any) -> None:
    machine = Machine(2)
    machine.special[2] = TrialResult("timeout", "too slow")
    measure(scenarios(model), conditions(), Silent(), machine)
    again = Machine(2)
    measure(scenarios(model), conditions(), Silent(), again)
    assert again.tried == [(2, True), (4, True), (3, True), (2, False)]
    (row,) = read_efficiency(conditions().out)
    assert (row.status, row.batch) == ("ok", 2)


@pytest.mark.parametrize("change", ["code", "seed", "target", "dtype"])
def test_other_circumstances_are_other_rows(
    model: str, conditions: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    measure(scenarios(model), conditions(), Silent(), Machine(2))
    changes: dict[str, Any] = {}
    if change == "code":
        monkeypatch.setattr(scenario_module, "code_fingerprint", lambda *modules: "new")
    elif change == "target":
        changes = {"target": dataclasses.replace(V100, limit=32 << 30)}
    else:
        changes = {"seed": 1} if change == "seed" else {"dtype": "float16"}
    machine = Machine(2)
    measure(scenarios(model), conditions(**changes), Silent(), machine)
    assert machine.tried == [(1, True), (2, True), (4, True), (3, True), (2, False)]
    rows = ROW_KIND.read(conditions().out / "efficiency.jsonl")
    assert len(rows) == 2
    assert len(read_efficiency(conditions().out)) == (1 if change == "code" else 2)


class Clock:
    """Time that passes only in tries, 60 seconds each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(run_module.time, "monotonic", lambda: self.now)


def test_the_minutes_end_a_run_cleanly(
    model: str, conditions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, machine, progress = Clock(monkeypatch), Machine(2), Notes()
    limits = []

    def slow(request: TrialRequest, timeout: float, log: Path) -> TrialResult:
        limits.append(timeout)
        if timeout < 60:
            clock.now += timeout
            return TrialResult("timeout", "cut short")
        clock.now += 60
        return machine(request, timeout, log)

    two = scenarios(model, "fp16,rtn_int2")
    assert not measure(two, conditions(minutes=7.5, timeout=100), progress, slow)
    # Five tries for the first row, two and a half for the second.
    assert limits == [100, 100, 100, 100, 100, 100, 90, 30]
    (row,) = read_efficiency(conditions().out)
    assert row.method == "fp16"
    assert [t.status for t in TRY_KIND.read(conditions().out / "tries.jsonl")].count("timeout") == 0
    assert "time is up" in progress.notes[-1]
    assert not measure(two, conditions(minutes=1, timeout=100), Notes(), slow)
    assert measure(two, conditions(minutes=9, timeout=100), Notes(), slow)
    assert len(read_efficiency(conditions().out)) == 2


def test_a_try_that_takes_too_long_is_a_result(model: str, conditions: Any) -> None:
    machine = Machine(2)
    machine.special[1] = TrialResult("timeout", "it had not ended after 600 s")
    assert measure(scenarios(model), conditions(minutes=60), Silent(), machine)
    (row,) = read_efficiency(conditions().out)
    assert (row.status, row.batch) == ("timeout", 0)


def test_what_a_run_was_is_written_down(
    model: str, conditions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/kvbench", "efficiency", "--gpu", "v100"])
    measure(scenarios(model), conditions(), Silent(), Machine(1))
    document = json.loads((conditions().out / "run.json").read_text())
    assert document["request"]["scenarios"][0]["method"] == "fp16"
    assert document["request"]["target"]["profile"]["name"] == "v100"
    assert document["environment"]["devices"] == ["NVIDIA H100"]
    assert document["command"] == "kvbench efficiency --gpu v100"


@pytest.mark.parametrize("gpu", ["v100", "h200"])
def test_without_a_card_the_capacity_model_answers(
    model: str, conditions: Any, monkeypatch: pytest.MonkeyPatch, gpu: str
) -> None:
    monkeypatch.undo()
    profile = PROFILES[gpu]
    machine = Machine(9)
    target = Target(profile, None, profile.memory)
    two = scenarios(model, "fp16,akvq_vl", input_tokens=900, output_tokens=300)
    progress = Notes()
    measure(two, conditions(target=target), progress, machine)
    assert not machine.requests
    assert f"no GPU here has the memory of {profile.label}" in progress.notes[0]
    rows: list[EfficiencyRow] = read_efficiency(conditions().out)
    assert {row.memory for row in rows} == {"modelled"}
    assert rows[1].batch > rows[0].batch > 100
    assert {row.device for row in rows} == {""}


def test_this_very_card_is_measured(model: str, conditions: Any) -> None:
    target = Target(GPUProfile("auto", "GB900", 500 << 30), "GB900", None)
    machine = Machine(1)
    measure(scenarios(model), conditions(target=target), Silent(), machine)
    (row,) = read_efficiency(conditions().out)
    assert (row.memory, row.memory_limit, row.gpu) == ("measured", None, "auto")
    assert machine.requests[0].memory_limit is None


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"input_tokens": 0}, "at least 1"),
        ({"output_tokens": 0}, "at least 1"),
        ({"vision_tokens": 15}, "whole images of 16 tokens"),
        ({"vision_tokens": 48}, "don't fit"),
    ],
)
def test_impossible_scenarios_end_a_run_before_it_begins(
    model: str, conditions: Any, changes: dict[str, int], part: str
) -> None:
    machine = Machine(1)
    good = scenarios(model)
    with pytest.raises(UserError, match=part):
        measure([*good, *scenarios(model, **changes)], conditions(), Silent(), machine)
    assert not machine.requests


def test_text_models_see_no_images(tiny_text_folder: Path, conditions: Any) -> None:
    text = f"tiny={tiny_text_folder}"
    assert setting(scenarios(text)[0], conditions()).vision_tokens == 0
    with pytest.raises(UserError, match="takes no images: use --vision-tokens 0"):
        setting(scenarios(text, vision_tokens=16)[0], conditions())


def test_a_folder_without_weights_is_refused_where_it_would_be_run(
    tiny_llava_folder: Path, tmp_path: Path, conditions: Any
) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_llava_folder / "config.json").read_bytes())
    (asked,) = scenarios(f"tiny={folder}")
    with pytest.raises(UserError, match="safetensors"):
        setting(asked, conditions())
    shapes = setting(asked, conditions(target=Target(PROFILES["v100"], None, 64 << 30)))
    assert (shapes.revision, shapes.memory) == ("shapes", "modelled")


def test_weights_that_are_nowhere_are_random(conditions: Any) -> None:
    (asked,) = grid("llava15_7b", "fp16")
    found = setting(asked, conditions())
    assert (found.revision, found.vision_tokens, found.prefill_rows) == ("random", 576, 16)
    (long,) = grid("llava15_7b", "fp16", input_tokens=4000)
    found = setting(long, conditions())
    assert (found.vision_tokens, found.prefill_rows) == (3456, 2)


def test_grids() -> None:
    found = grid("llava15_7b,qwen2vl_7b", "fp16,kivi", read_batches("8, largest"))
    assert len(found) == 8 == len(set(found))
    assert {each.batch for each in found} == {8, None}
    with pytest.raises(UserError, match="did you mean"):
        grid("llava15_7", "fp16")
    for text in ("", "0", "8,x", "-3", "1.5"):
        with pytest.raises(UserError, match="give numbers from 1, or largest"):
            read_batches(text)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "half"}, {"seed": -1}, {"prefill_rows": 0}, {"timeout": 0}, {"minutes": -1},
     {"tolerance": 1.0}, {"out": Path(__file__)}],
)  # fmt: skip
def test_conditions_out_of_range(conditions: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        conditions(**changes)
