"""The Python API: stable names, a light import, and functions that do what the verbs do."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pandas
import pytest
from typer.testing import CliRunner

import kvbench
from kvbench import api
from kvbench.cli import app

LIGHT = 1.0  # seconds; torch alone takes more


def test_every_name_is_there_and_others_are_not() -> None:
    for name in kvbench.__all__:
        assert getattr(kvbench, name) is not None
    assert set(kvbench.__all__) <= set(dir(kvbench))
    with pytest.raises(AttributeError, match="has no attribute 'evalute'"):
        kvbench.evalute  # type: ignore[attr-defined]  # noqa: B018


def test_names_for_the_type_checker_are_those_at_run_time() -> None:
    """What stands under TYPE_CHECKING, what `__getattr__` finds and `__all__` are one list."""
    homes = {name: home for home, names in kvbench._HOMES.items() for name in names}
    assert {*homes, "__version__"} == set(kvbench.__all__)
    source = Path(str(kvbench.__file__)).read_text(encoding="utf-8")
    for name, home in homes.items():
        assert f"from kvbench.{home} import" in source, name


def test_importing_and_asking_for_light_names_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'lm_eval', 'numpy', 'typer'}"
    code = (
        "import sys, kvbench; kvbench.METHODS, kvbench.UserError, kvbench.evaluate;"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    bare = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    assert (bare - began) - (time.perf_counter() - bare) < LIGHT


@pytest.mark.parametrize("name", ["evaluate", "measure_efficiency", "compare", "quantized_cache"])
def test_functions_are_typed_and_explained(name: str) -> None:
    function = getattr(kvbench, name)
    document = inspect.getdoc(function) or ""
    arguments = list(inspect.signature(function).parameters)
    assert all(f"    {argument}: " in document for argument in arguments)
    assert "Raises:" in document and "Returns:" in document
    if name == "quantized_cache":
        assert set(get_type_hints(function)) == {*arguments, "return"}


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    from kvbench.tasks.minimile import make

    make(tmp_path / "drawn", samples=2, folders=("ObjectExistence", "WebQA"))
    return tmp_path / "drawn"


def test_evaluate_returns_rows_for_pandas(
    drawn: Path, tiny_llava_folder: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "methods": ["fp16", "akvq_vl[recent=8]"],
        "models": f"tiny={tiny_llava_folder}",
        "tasks": ["oe", "wqa"],
        "data_root": str(drawn),
        "limit": 1,
        "max_new_tokens": 2,
        "out": str(tmp_path / "run"),
    }
    rows = kvbench.evaluate(**asked)
    assert {type(row) for row in rows} == {kvbench.SampleRow}
    assert {(row.method, row.task) for row in rows} == {
        (method, task) for method in ("fp16", "akvq_vl[recent=8]") for task in ("oe", "wqa")
    }
    table = pandas.DataFrame(rows)
    assert len(table) == 4
    assert set(table.columns) >= {"method", "correct", "kl_mean", "cache_bytes"}
    assert kvbench.evaluate(**asked) == rows  # nothing runs again
    assert kvbench.compare(tmp_path / "run", tmp_path / "run").ok


def test_measure_efficiency_returns_rows_for_pandas(
    tiny_llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvbench.efficiency.profiles.visible_device", lambda: None)
    rows = kvbench.measure_efficiency(
        ["fp16", "akvq_vl"],
        f"tiny={tiny_llava_folder}",
        gpu="h100",
        input_tokens=40,
        output_tokens=4,
        batch=[2, "largest"],
        out=tmp_path,
    )
    assert {type(row) for row in rows} == {kvbench.EfficiencyRow}
    assert [(row.method, row.fixed_batch) for row in rows] == [
        ("fp16", 2), ("akvq_vl", 2), ("fp16", None), ("akvq_vl", None),
    ]  # fmt: skip
    assert set(pandas.DataFrame(rows).memory) == {"modelled"}


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: kvbench.evaluate("kivy"), "did you mean kivi?"),
        (lambda: kvbench.evaluate("fp16", limit=0), "--limit is 0"),
        (lambda: kvbench.evaluate([]), "empty name"),
        (lambda: kvbench.measure_efficiency(gpu="v1000"), "did you mean v100"),
        (lambda: kvbench.measure_efficiency(preset="papers"), "there is paper"),
        (lambda: kvbench.measure_efficiency("fp16", preset="paper"), "has its own --methods"),
        (lambda: kvbench.compare("/no/such", "/no/such"), "/no/such"),
    ],
)
def test_bad_input_is_a_user_error(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(kvbench.UserError) as caught:
        call()
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("eval --methods fp16", "evaluate"),
        ("efficiency", "measure_efficiency"),
        ("compare a b", "compare"),
    ],
)
def test_verbs_call_the_functions(
    monkeypatch: pytest.MonkeyPatch, words: str, function: str
) -> None:
    """With every argument under the name that it has here."""
    signature = inspect.signature(getattr(api, function))

    def called(*arguments: Any, **named: Any) -> None:
        signature.bind(*arguments, **named)
        raise kvbench.UserError(f"{function} was called")

    monkeypatch.setattr(api, function, called)
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 2
    assert f"{function} was called" in result.stderr
