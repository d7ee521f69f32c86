"""The smaller verbs: list, data, report, calibrate, --version."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import kvbench
from kvbench.errors import UserError
from kvbench.registry import METHODS, TASKS

Invoke = Callable[..., Result]


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"kvbench {kvbench.__version__}\n"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("methods", ["akvq_vl", "KIVI", "arXiv 2402.02750", "recent=128"]),
        ("models", ["kvbench.models.smol_llava:load", "llava-hf/llava-v1.6-mistral-7b-hf"]),
        ("tasks", ["ObjectExistence", "easy_vqa", "DQA"]),
    ],
)
def test_list(invoke: Invoke, kind: str, words: list[str]) -> None:
    result = invoke("list", kind)
    assert result.exit_code == 0, result.output
    for word in words:
        assert word in result.stdout


def test_list_says_what_parameters_mean(invoke: Invoke) -> None:
    """In the words of each class, so that a None is explained where it is defined."""
    assert "kvbench list methods NAME" in invoke("list", "methods").stdout
    result = invoke("list", "methods", "akvq_vl", "kivi")
    assert result.exit_code == 0, result.output
    for name in ("akvq_vl", "kivi"):
        assert inspect.getdoc(type(METHODS.get(name))) in result.stdout
    assert "clip=None" in result.stdout


def test_every_none_is_explained() -> None:
    for name in METHODS.names():
        method: Any = METHODS.get(name)
        if any(getattr(method, field.name) is None for field in dataclasses.fields(method)):
            assert re.search(r"\bNone\b", inspect.getdoc(type(method)) or ""), name


def test_list_refuses_unknown_names(invoke: Invoke) -> None:
    result = invoke("list", "methods", "kivy")
    assert (result.exit_code, result.stderr) == (
        2,
        "kvbench: unknown method 'kivy': did you mean kivi?\n",
    )


def test_list_refuses_other_kinds(invoke: Invoke) -> None:
    result = invoke("list", "method")
    assert result.exit_code == 2
    assert "methods" in result.stderr


def test_list_shows_broken_plugins(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    good = TASKS.get("oe")

    def get(name: str) -> Any:
        if name == "bad":
            raise UserError("task 'bad' comes from the plug-in x:y, which can't be imported")
        return good

    monkeypatch.setattr(TASKS, "names", lambda: ["bad", "oe"])
    monkeypatch.setattr(TASKS, "get", get)
    result = invoke("list", "tasks")
    assert result.exit_code == 0
    assert "broken: task 'bad' comes from the plug-in x:y" in result.stdout
    assert "ObjectExistence" in result.stdout


def test_data_made_is_found_sound(invoke: Invoke, tmp_path: Path) -> None:
    root = tmp_path / "data"
    made = invoke("data", "make", root, "--seed", 3, "--samples", 1)
    assert (made.exit_code, made.stdout) == (0, f"12 tasks of 1 samples in {root}\n"), made.output
    checked = invoke("data", "check", root)
    assert checked.exit_code == 0, checked.output
    assert "ObjectExistence" in checked.stdout


def test_data_check_names_faults(invoke: Invoke, tmp_path: Path) -> None:
    root = tmp_path / "data"
    invoke("data", "make", root, "--samples", 1)
    path = root / "ObjectExistence" / "ObjectExistence.json"
    path.write_text(json.dumps({"data": []}))
    result = invoke("data", "check", root)
    assert result.exit_code == 1
    assert str(path) in result.stdout


@pytest.mark.parametrize("words", ["--samples 0", "--seed -1", "--samples x"])
def test_data_make_refuses_numbers(invoke: Invoke, tmp_path: Path, words: str) -> None:
    result = invoke("data", "make", tmp_path / "data", *words.split())
    assert result.exit_code == 2
    assert not (tmp_path / "data").exists()


def test_data_make_refuses_a_used_folder(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    result = invoke("data", "make", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"kvbench: {tmp_path} is not an empty folder: choose a new one\n"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_data_check_of_a_missing_root(invoke: Invoke) -> None:
    result = invoke("data", "check", "/no/such")
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: data root /no/such")


def test_report_of_an_empty_folder(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert str(tmp_path) in result.stderr


def test_calibrate(invoke: Invoke, replace: Callable[..., None], tmp_path: Path) -> None:
    requests = []

    def calibrate(request: Any, progress: Any) -> list[Path]:
        requests.append(request)
        return [request.out / "smol_llava.safetensors"]

    replace("kvbench.evaluation.calibration", calibrate=calibrate)
    words = "--models smol_llava --methods skvq --samples 4 --seed 2"
    folders = ["--data", tmp_path, "--out", tmp_path / "statistics"]
    result = invoke("calibrate", *words.split(), *folders)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'statistics' / 'smol_llava.safetensors'}\n"
    (request,) = requests
    assert [method.spec for method in request.methods] == ["skvq"]
    assert (request.samples, request.seed, request.data_root) == (4, 2, tmp_path)


@pytest.mark.parametrize("words", ["--samples 0", "--data /no/such", "--models smol_lava"])
def test_calibrate_refuses(invoke: Invoke, tmp_path: Path, words: str) -> None:
    result = invoke("calibrate", "--out", tmp_path, *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
