"""``kvbench new method``: what it writes works as written, and bad input is one sentence."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

import kvbench.skeletons.method as skeletons

Invoke = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvbench", "methods", "tasks", "kernels", "results/paper")


def bare(source: str) -> str:
    """The code without docstrings, comments and the text of its label."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return re.sub(r"(label: ClassVar\[str\] = ).*", r"\1", ast.unparse(tree))


def test_it_is_what_the_readme_teaches() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    taught = next(block for block in blocks if "METHODS: dict" in block)
    written = skeletons.method_skeleton("int4_window", ROOT, package=False).files
    assert bare(written[ROOT / "methods/int4_window.py"]) == bare(taught)


def test_a_package(invoke: Invoke, tmp_path: Path) -> None:
    result = invoke("new", "method", "int4_window", "--package", "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    root = tmp_path / "kvbench-int4-window"
    names = {"kvbench_int4_window.py", "test_kvbench_int4_window.py", "pyproject.toml"}
    assert {path.name for path in root.iterdir()} == names
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    value = "kvbench_int4_window:METHOD"
    assert project["entry-points"]["kvbench.methods"] == {"int4_window": value}
    assert project["name"] == "kvbench-int4-window"
    assert f"python -m pip install -e {root}" in result.stdout
    assert "METHOD: KVQuantizer = Int4Window()" in (root / "kvbench_int4_window.py").read_text()
    again = invoke("new", "method", "int4_window", "--package", "--folder", tmp_path)
    assert again.exit_code == 2
    assert "is there already" in again.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("Int4", "'Int4' can't name a method"),
        ("4bit", "'4bit' can't name a method"),
        ("int4-window", "can't name a method: use a word like int4_window"),
        ("lambda", "can't name a method"),
        ("all", "can't name a method"),
        ("../x", "can't name a method"),
        ("kivi", "there is a method 'kivi' already, from kvbench.methods.kivi"),
        ("akvq_vl --package", "there is a method 'akvq_vl' already"),
        ("mine --folder /no/such", "is not the checkout that this kvbench runs from"),
    ],
)
def test_bad_input_is_one_line(invoke: Invoke, words: str, part: str) -> None:
    result = invoke("new", "method", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Neither is half of it written."""
    theirs, other = tmp_path / "a.py", tmp_path / "b.py"
    other.write_text("mine\n")
    with pytest.raises(skeletons.UserError, match=r"b\.py is there already"):
        skeletons.Skeleton({theirs: "", other: ""}, ()).write()
    assert other.read_text() == "mine\n"
    assert not theirs.exists()


@pytest.mark.slow
def test_in_a_checkout_it_works_as_written(tmp_path: Path, tiny_llava_folder: Path) -> None:
    """Write it, run its test, run it through an evaluation of the tiny LLaVA."""
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {**os.environ, "PYTHONPATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = run("kvbench", "new", "method", "mine")
    pytest_command, eval_command = (line.strip() for line in said.splitlines()[-2:])
    assert pytest_command == "python -m pytest tests/methods/test_mine.py"
    assert "4 passed" in run("pytest", *pytest_command.split()[3:], "-q")
    assert "mine" in run("kvbench", "list", "methods")
    run("kvbench", "data", "make", "data", "--samples", "1")
    tiny = f"--models tiny={tiny_llava_folder} --data-root data --device cpu --max-new-tokens 3"
    run(*eval_command.split(), *tiny.split(), "--out", "run", "--limit", "1")
    lines = (tmp_path / "run" / "table2.md").read_text().splitlines()
    assert any(line.startswith("| mine") for line in lines)
