"""What the README shows works as shown."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from kvbench import cache_argument, quantized_cache
from kvbench.cli import app

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Every kvbench command, in a block or in running text."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    inline = [line.replace("\n", " ") for line in re.findall(r"`([^`]+)`", text)]
    return [line for line in (*lines, *inline) if line.startswith("kvbench ")]


def test_commands_are_found() -> None:
    assert {command.split()[1] for command in commands()} == {
        "ablate",
        "analyze",
        "bench",
        "calibrate",
        "compare",
        "data",
        "doctor",
        "efficiency",
        "eval",
        "list",
        "lm-eval",
        "match",
        "new",
        "perplexity",
        "report",
        "tune",
    }


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command: str) -> None:
    """Verbs and options exist; nothing is run."""
    verb: Any = get_command(app)
    words = shlex.split(command)[1:]
    while hasattr(verb, "commands"):
        verb = verb.commands[words.pop(0)]
    known = {option for parameter in verb.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_example_method_generates(
    tiny_text_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(block for block in blocks("python") if "METHODS" in block)
    (tmp_path / "int4_window.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    method = importlib.import_module("int4_window").METHODS["int4_window"]
    tiny = tiny_text_model()
    ids = torch.arange(5, 25)[None]
    cache = quantized_cache(tiny.model, method)
    answer = tiny.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(tiny.model, cache),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
    )
    assert answer.shape == (1, 23)
