"""Every command and every Python example of docs/ runs, on stand-ins for what it names.

Substituted: `/models/mine` is a tiny LLaVA and `/models/text` a tiny LLaMA, both random;
`/data/MileBench`, and the data that are used where none are named, are a few drawn samples of two
tasks. Commands get `STAND_INS` behind their own words: a CPU, fewer samples, shorter answers. A
package is installed into a folder on the path instead of the environment. What is quoted in running
text is parsed and not run.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import kvbench
from kvbench.cli import app
from kvbench.registry import METHODS
from kvbench.report import details, efficiency_tables, table2
from kvbench.report.board import SETTING_COLUMNS, Block, Setting
from kvbench.report.regression import text as comparison

ROOT = Path(__file__).resolve().parents[1]
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")}
STAND_INS = {
    "eval": "--device cpu --limit 1 --max-new-tokens 2 --tasks oe,wqa",
    "doctor": "--device cpu",
    "data": "",
    "efficiency": "--input-tokens 40 --output-tokens 4",
    "report": "",
    "compare": "",
    "new": "",
}
# A doctor may find faults, and a check of two folders with ten tasks missing does.
SETTING = Setting(**dict.fromkeys(SETTING_COLUMNS, ""))
CODES = {"doctor": {0, 1}, "data": {0, 1}}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def lines(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line]


def quoted(page: str) -> list[str]:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    found = [part.replace("\n", " ") for part in re.findall(r"`([^`]+)`", text)]
    return [part for part in found if part.startswith("kvbench ")]


@pytest.fixture
def place(
    tmp_path: Path,
    tiny_llava_folder: Path,
    tiny_text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], str]]:
    """An empty folder to run in; returns what puts stand-ins into a text."""
    from kvbench.tasks.minimile import make

    data = tmp_path / "drawn"
    make(data, samples=2, folders=("ObjectExistence", "WebQA"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVBENCH_DATA", str(data))
    monkeypatch.setattr("kvbench.tasks.minimile.default_root", lambda: data)
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    paths = {
        "/models/mine": str(tiny_llava_folder),
        "/models/text": str(tiny_text_folder),
        "/data/MileBench": str(data),
    }

    def put(text: str) -> str:
        for path, other in paths.items():
            text = text.replace(path, other)
        return text

    yield put
    METHODS.__dict__.pop("_plugins", None)


def run(line: str, folder: Path) -> None:
    program, *words = shlex.split(line)
    if program == "kvbench":
        more = STAND_INS[words[0]].split()
        result = CliRunner().invoke(app, [*words, *more])
        assert result.exit_code in CODES.get(words[0], {0}), result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return
    assert (program, words[0]) == ("python", "-m")
    if words[1:4] == ["pip", "install", "-e"]:
        options = "--no-deps --no-build-isolation --no-index --quiet --target site"
        words = ["-m", "pip", "install", *options.split(), f"./{words[4]}"]
        METHODS.__dict__.pop("_plugins", None)
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    importlib.invalidate_caches()


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_run(page: str, place: Callable[[str], str], tmp_path: Path) -> None:
    for line in lines(page):
        run(place(line), tmp_path)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_examples_run(
    page: str, place: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other, as in a notebook."""
    scope: dict[str, Any] = {"__name__": "__example__"}
    for block in blocks(page, "python"):
        exec(compile(place(block), page, "exec", dont_inherit=True), scope)
    if page == "python-api":
        assert "unknown method 'kivy': did you mean kivi?" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for page in sorted(PAGES) for c in quoted(page)])
def test_quoted_commands_parse(command: str) -> None:
    verb: Any = get_command(app)
    words = shlex.split(command)[1:]
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    known = {option for parameter in verb.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_pages_are_found_and_link_to_what_is_there() -> None:
    names = {"add-a-method", "measure-your-model", "python-api", "what-the-columns-mean"}
    assert names <= set(PAGES)
    for text in PAGES.values():
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / "docs" / target).exists(), target


def columns(section: str) -> list[str]:
    """Names in the first cells of a section's table."""
    text = PAGES["what-the-columns-mean"].split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (?:a task, such as )?`([^`]+)`", text, re.MULTILINE)


def test_every_column_is_explained_once() -> None:
    tables = efficiency_tables
    groups = (tables.MAIN, tables.BASIS, tables.LARGEST, tables.FIXED, tables.SPLIT, tables.STEP)
    efficiency = {title for group in (*groups, tables.PAPER) for title, _ in group}
    expected = {
        "table2": set(table2.grid(Block(SETTING, ("oe",), (), {}, {}, ()))[0]),
        "details": set(details._HEADERS),
        "table4": {"Method", *efficiency},
        "compare": set(comparison.HEADERS),
    }
    for section, names in expected.items():
        assert sorted(columns(section)) == sorted(names), section


def test_every_public_name_is_documented() -> None:
    table = PAGES["python-api"].split("\n## ")[0]
    named = {
        name
        for first in re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", first)
    }
    rows = {"Registry", "SampleRow", "EfficiencyRow", "Comparison"}  # in the second column
    assert all(f"`{name}`" in table for name in rows)
    assert named | rows | {"__version__"} == set(kvbench.__all__)
