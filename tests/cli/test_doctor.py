"""``kvbench doctor``: what it prints, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.doctor import Finding, Status

Invoke = Callable[..., Result]
GOOD = Finding("disk", Status.OK, "results", "50 GiB free")
NOTE = Finding("devices", Status.NOTE, "cuda", "none", "get one")
BAD = Finding("disk", Status.FAIL, "cache", "full", "free space")


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the examination finds; the request is put in front."""
    found: list[Any] = []

    def examine(request: Any) -> Any:
        yield from found
        found.insert(0, request)

    monkeypatch.setattr("kvbench.doctor.examine", examine)
    return found


def test_lines(invoke: Invoke, findings: list[Any]) -> None:
    findings += [NOTE, GOOD, BAD]
    result = invoke("doctor", "--model", "none")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "devices",
        "  note  cuda: none",
        "        do: get one",
        "",
        "disk",
        "  ok    results: 50 GiB free",
        "  fail  cache: full",
        "        do: free space",
        "",
        "1 fail, 1 note, 1 ok",
    ]


def test_notes_alone_are_fine(invoke: Invoke, findings: list[Any]) -> None:
    findings += [NOTE, GOOD]
    assert invoke("doctor", "--model", "none").exit_code == 0


@pytest.mark.parametrize(("last", "code"), [(NOTE, 0), (BAD, 1)])
def test_json(invoke: Invoke, findings: list[Any], last: Finding, code: int) -> None:
    findings += [GOOD, last]
    result = invoke("doctor", "--model", "none", "--json")
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert document["ok"] == (code == 0)
    assert document["findings"][0] == {
        "section": "disk",
        "status": "ok",
        "name": "results",
        "text": "50 GiB free",
        "advice": "nothing to do",
    }


def test_options_arrive(invoke: Invoke, findings: list[Any], tmp_path: Path) -> None:
    words = "--methods kivi,rtn_int2[bits=3] --device cpu --dtype float32"
    result = invoke("doctor", *words.split(), "--data-root", tmp_path)
    assert result.exit_code == 0, result.output
    (request,) = findings
    assert [choice.spec for choice in request.methods] == ["kivi", "rtn_int2[bits=3]"]
    assert request.model.name == "smol_llava"
    assert (request.device, request.dtype, request.data_root) == ("cpu", "float32", tmp_path)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--model smol_lava", "did you mean smol_llava"),
        ("--model smol_llava,llava15_7b", "names 2 models"),
        ("--model tiny=/no/such", "/no/such"),
        ("--methods kivy", "did you mean kivi?"),
        ("--device gpu", "unknown device"),
        ("--dtype half", "unknown dtype"),
        ("--data-root /no/such", "data root /no/such does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, findings: list[Any], words: str, part: str
) -> None:
    result = invoke("doctor", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1
    assert findings == []


def test_a_real_examination(invoke: Invoke, tiny_llava_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = ["--model", f"tiny={tiny_llava_folder}", "--methods", "fp16,kivi", "--device", "cpu"]
    result = invoke("doctor", *words, "--data-root", tmp_path / "data", "--json")
    document = json.loads(result.stdout)
    found = {(f["section"], f["name"]): f for f in document["findings"]}
    assert found["checks on tiny", "1-bit cache"]["status"] == "ok"
    assert found["checks on tiny", "kivi"]["status"] == "ok"
    assert found["kernels on tiny", "kivi"]["text"].startswith("eval: torch, no CUDA device")
    assert found["models", "tiny"]["text"] == str(tiny_llava_folder)
