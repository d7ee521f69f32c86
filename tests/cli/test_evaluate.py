"""``kvbench eval``: from words to a request, and from what happens to an exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.errors import UserError
from kvbench.evaluation.request import EvalRequest

Invoke = Callable[..., Result]


class Recorder:
    """Stands in for the evaluation and the report: remembers the request, then does as told."""

    def __init__(self) -> None:
        self.request: EvalRequest | None = None
        self.outcome: BaseException | None = None
        self.shown: list[Path] = []

    def evaluate(self, request: EvalRequest, progress: Any) -> None:
        self.request = request
        progress.begin(10, 3)
        progress.cell("smol_llava · kivi · oe")
        progress.advance()
        if self.outcome is not None:
            raise self.outcome

    def write_report(self, directory: Path) -> list[Path]:
        self.shown.append(directory)
        return [directory / "table2.md"]


@pytest.fixture
def recorder(replace: Callable[..., None]) -> Recorder:
    recorder = Recorder()
    replace("kvbench.evaluation.run", evaluate=recorder.evaluate)
    replace(
        "kvbench.report",
        write_report=recorder.write_report,
        read_results=lambda directory: ([], {}),
        print_summary=lambda rows, run: print("the table"),
    )
    return recorder


def asked(recorder: Recorder) -> EvalRequest:
    assert recorder.request is not None
    return recorder.request


def test_defaults(invoke: Invoke, recorder: Recorder) -> None:
    result = invoke("eval", "--methods", "fp16")
    assert result.exit_code == 0, result.output
    request = asked(recorder)
    assert [model.name for model in request.models] == ["smol_llava"]
    assert len(request.tasks) == 12
    assert request.protocols == ("quantized_prefill",)
    assert request.data_root is None
    assert request.limit is None
    assert request.out.parent == Path("results/runs")
    assert recorder.shown == [request.out]
    assert result.stdout.splitlines() == ["the table", str(request.out / "table2.md")]


def test_options_arrive(invoke: Invoke, recorder: Recorder, tmp_path: Path) -> None:
    grid = "--methods kivi,akvq_vl[recent=64] --models smol_llava --tasks oe,dqa --protocol both"
    numbers = "--limit 3 --seed 5 --batch 2 --calibration-samples 7 --device cpu --dtype float32"
    folders = ["--out", tmp_path / "run", "--data-root", tmp_path, "--calibration", tmp_path]
    result = invoke("eval", *grid.split(), *numbers.split(), *folders)
    assert result.exit_code == 0, result.output
    request = asked(recorder)
    assert [method.spec for method in request.methods] == ["kivi", "akvq_vl[recent=64]"]
    assert request.tasks == ("oe", "dqa")
    assert request.protocols == ("quantized_prefill", "exact_prefill")
    assert (request.limit, request.seed, request.batch) == (3, 5, 2)
    assert (request.device, request.dtype) == ("cpu", "float32")
    assert (request.out, request.data_root) == (tmp_path / "run", tmp_path)
    assert (request.calibration, request.calibration_samples) == (tmp_path, 7)


def test_options_of_workers_arrive(invoke: Invoke, recorder: Recorder) -> None:
    words = "--executor ray --address head:6379 --workers 3 --gpus-per-worker 2 --device auto-map"
    invoke("eval", "--methods", "fp16", *words.split())
    request = asked(recorder)
    assert (request.executor, request.address) == ("ray", "head:6379")
    assert (request.workers, request.gpus_per_worker, request.device) == (3, 2, "auto-map")


def test_data_root_from_the_environment(invoke: Invoke, recorder: Recorder, tmp_path: Path) -> None:
    invoke("eval", "--methods", "fp16", KVBENCH_DATA=str(tmp_path))
    assert asked(recorder).data_root == tmp_path


def test_progress_goes_to_stderr(invoke: Invoke, recorder: Recorder) -> None:
    result = invoke("eval", "--methods", "fp16")
    assert "3 of 10 samples are there already" in result.stderr
    assert "3/10 smol_llava · kivi · oe" in result.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--methods kivy", "did you mean kivi?"),
        ("--methods kivi[bitz=2]", "did you mean bits?"),
        ("--methods kivi[bits=two]", "must be a whole number"),
        ("--models smol_lava", "did you mean smol_llava"),
        ("--models llava15_7b=/no/such", "/no/such"),
        ("--tasks ooe", "unknown task"),
        ("--protocol exact", "did you mean exact_prefill?"),
        ("--limit 0", "--limit is 0"),
        ("--batch 0", "--batch is 0"),
        ("--seed -1", "--seed is -1"),
        ("--device gpu", "unknown device"),
        ("--dtype half", "unknown dtype"),
        ("--data-root /no/such", "data root /no/such does not exist"),
        ("--calibration /no/such", "calibration folder /no/such does not exist"),
        (f"--out {__file__}", "is a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, recorder: Recorder, words: str, part: str
) -> None:
    result = invoke("eval", "--methods", "fp16", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert recorder.request is None


@pytest.mark.parametrize(
    ("words", "part"),
    [("evl", "eval"), ("eval --lmit 3", "--limit"), ("eval --limit three", "--limit")],
)
def test_typing_errors_exit_with_2(invoke: Invoke, words: str, part: str) -> None:
    result = invoke(*words.split())
    assert result.exit_code == 2
    assert part in result.stderr


def test_interrupted_run_says_how_to_go_on_and_shows_what_it_has(
    invoke: Invoke, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.outcome = KeyboardInterrupt()
    (tmp_path / "samples.jsonl").write_text("{}\n")
    result = invoke("eval", "--methods", "fp16", "--out", tmp_path)
    assert result.exit_code == 130
    assert f"--out {tmp_path} goes on" in result.stderr
    assert result.stdout.startswith("the table")


def test_interrupted_before_the_first_row(
    invoke: Invoke, recorder: Recorder, tmp_path: Path
) -> None:
    recorder.outcome = KeyboardInterrupt()
    result = invoke("eval", "--methods", "fp16", "--out", tmp_path)
    assert result.exit_code == 130
    assert recorder.shown == []


def test_errors_of_the_run(invoke: Invoke, recorder: Recorder) -> None:
    recorder.outcome = UserError("the checkpoint is incomplete: download it again")
    result = invoke("eval", "--methods", "fp16")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        2,
        "kvbench: the checkpoint is incomplete: download it again",
    )


def test_a_full_disk_is_bad_input_and_a_bug_is_not(invoke: Invoke, recorder: Recorder) -> None:
    recorder.outcome = OSError(28, "No space left on device", "/data/run")
    result = invoke("eval", "--methods", "fp16")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "kvbench: can't use /data/run: No space left on device"
    recorder.outcome = ZeroDivisionError("a bug")
    assert isinstance(invoke("eval", "--methods", "fp16").exception, ZeroDivisionError)
