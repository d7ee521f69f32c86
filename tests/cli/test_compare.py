"""``kvbench compare``: exit codes and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import Result

from kvbench.evaluation.rows import SampleRow

Invoke = Callable[..., Result]
TEXTS = (
    *("revision", "dtype", "dataset", "prompt_style", "prompt_sha256", "images_sha256"),
    *("calibration", "version", "answer", "extracted"),
)
NUMBERS = ("task_version", "images_kept", "images_total", "prompt_tokens", "generated_tokens")
ROW = {
    **dict.fromkeys(SampleRow.__dataclass_fields__),
    **dict.fromkeys(TEXTS, "x"),
    **dict.fromkeys(NUMBERS, 1),
    **dict.fromkeys(("strict", "empty", "unparsable", "truncated"), False),
    **{"schema": 1, "model": "tiny", "method": "kivi", "storage": "packed", "status": "ok"},
    **{"protocol": "exact_prefill", "task": "oe", "batch": 1, "packed_tokens_read": 9},
    **{"generation": {}, "seconds": {}},
}


@pytest.fixture
def make_run() -> Callable[..., Path]:
    """Write a run of twenty samples, the first `right` of them right."""

    def make(folder: Path, right: int) -> Path:
        folder.mkdir()
        rows = [
            {**ROW, "key": str(sample), "sample_id": sample, "correct": sample < right}
            for sample in range(20)
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture
def run(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """A run of one method, all answers right."""
    return make_run(tmp_path / "run", right=20)


@pytest.fixture
def worse(tmp_path: Path, make_run: Callable[..., Path]) -> Path:
    """The same with twelve answers wrong."""
    return make_run(tmp_path / "worse", right=8)


def test_a_run_is_no_worse_than_itself(invoke: Invoke, run: Path) -> None:
    result = invoke("compare", run, run)
    assert result.exit_code == 0, result.output
    assert "OK: none of 1" in result.stdout


def test_a_drop_fails_and_is_written(
    invoke: Invoke, run: Path, worse: Path, tmp_path: Path
) -> None:
    saved, text, xml = tmp_path / "b.jsonl.gz", tmp_path / "c.md", tmp_path / "c.xml"
    made = invoke("compare", run, "--save", saved)
    assert (made.exit_code, made.stdout) == (0, f"20 samples in {saved}\n"), made.output
    result = invoke("compare", worse, saved, "--markdown", text, "--junit", xml)
    assert result.exit_code == 1, result.output
    assert "mean dropped by 60.0 points" in result.stdout
    assert text.read_text().startswith("## FAIL")
    assert ElementTree.parse(xml).getroot().attrib["failures"] == "2"
    assert invoke("compare", worse, saved, "--max-drop", 60).exit_code == 0
    assert invoke("compare", run, worse).exit_code == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["RUN"], "give a BASELINE"),
        (["RUN", "RUN", "--save", "x.jsonl.gz"], "not both"),
        (["RUN", "/no/such"], "/no/such does not exist"),
        (["/no/such", "RUN"], "/no/such does not exist"),
        (["RUN", "--save", "x.txt"], "end it in .jsonl.gz"),
        (["RUN", "--save", "/dev/null/x.jsonl.gz"], "can't write"),
        (["RUN", "RUN", "--junit", "/no/such/x.xml"], "can't write"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    invoke: Invoke, run: Path, words: list[str], part: str
) -> None:
    result = invoke("compare", *(run if word == "RUN" else word for word in words))
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("value", ["-1", "101", "x", "nan"])
def test_max_drop_is_points(invoke: Invoke, run: Path, value: str) -> None:
    assert invoke("compare", run, run, "--max-drop", value).exit_code == 2
