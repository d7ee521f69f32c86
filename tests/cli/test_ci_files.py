"""Commands in tox.ini, the workflow to copy and the hook: verbs and options exist."""

from __future__ import annotations

import configparser
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from kvbench.cli import app
from kvbench.report.regression import read_outcomes

ROOT = Path(__file__).resolve().parents[2]


def commands() -> Iterator[str]:
    workflow = yaml.safe_load((ROOT / ".ci" / "github-workflow.yml").read_text())
    for step in workflow["jobs"]["compare"]["steps"]:
        yield from re.findall(r"^kvbench .*", step.get("run", ""), re.MULTILINE)
    for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()):
        yield hook["entry"]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    for section in ("testenv:regression", "testenv:baseline"):
        for line in tox[section]["commands"].strip().splitlines():
            for name, text in tox["regression"].items():
                line = line.replace(f"{{[regression]{name}}}", text.replace("\\\n", " "))
            yield line.partition("-m ")[2]


def test_commands_are_found() -> None:
    verbs = [command.split()[1] for command in commands()]
    assert verbs == ["eval", "compare", "compare", "eval", "compare", "eval", "compare"]


@pytest.mark.parametrize("command", list(commands()))
def test_commands_parse(command: str) -> None:
    _, verb, *words = shlex.split(command)
    found: Any = get_command(app)
    known = {option for parameter in found.commands[verb].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_baseline_is_there() -> None:
    """Nine built-in methods, both protocols, as tox -e regression answers them."""
    found = read_outcomes(ROOT / "results" / "baselines" / "smol_llava_cpu.jsonl.gz")
    assert len({(one.method, one.protocol) for one in found}) >= 18
    assert {one.status for one in found} == {"ok"}
    assert all(one.correct is not None for one in found)
