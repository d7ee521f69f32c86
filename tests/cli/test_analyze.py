"""``kvbench analyze`` on a tiny model: tables, figures, and what `eval` does with the finding."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.evaluation import choices

Invoke = Callable[..., Result]
TABLES = {
    "attention_by_head": 3 * 4,
    "channels": 2 * 16,
    "errors": 2 * 3,
    "massive_activations": 3,
    "outliers": 2 * 3,
    "patterns": 3,
    "pivot_detector": 3,
}
FIGURES = {
    *("attention_by_head", "attention_by_position", "attention_maps", "channels", "errors"),
    *("layer_influence", "massive_activations", "outliers", "pivot_detector"),
}


@pytest.fixture
def analyzed(invoke: Invoke, data: Path, tiny_llava_folder: Path, tmp_path: Path) -> Any:
    words = ["--tasks", "oe,wqa", "--samples", 3, "--near", 4, "--whole-prompt", 1]
    words += ["--methods", "rtn_int2,akvq_vl[recent=8],hf_quanto_int2", "--device", "cpu"]
    model = ["--models", f"tiny={tiny_llava_folder}", "--data", data, "--out", tmp_path]
    return invoke("analyze", *words, *model)


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_everything_is_written(analyzed: Result, tmp_path: Path) -> None:
    assert analyzed.exit_code == 0, analyzed.output
    folder = tmp_path / "tiny"
    assert "hf_quanto_int2 is left out" in analyzed.stderr
    for name, count in TABLES.items():
        assert len(table(folder, name)) == count, name
    for name in FIGURES:
        assert (folder / f"{name}.svg").stat().st_size > 1000
        assert (folder / f"{name}.png").stat().st_size > 1000
    found = json.loads((folder / "analysis.json").read_text())
    assert [prompt["task"] for prompt in found["prompts"]] == ["oe", "oe", "wqa"]
    text = (folder / "analysis.md").read_text()
    for part in ("Table I", "Precision", "quantized prefill", "akvq\\_vl"):
        assert part in text or part.replace("\\", "") in text
    first = table(folder, "errors")[0]
    assert (first["prompts_exact"], first["prompts_quantized"]) == ("3", "1")
    positions = table(folder, "attention_by_position")
    shares = {float(line["vision_share"]) for line in positions}
    assert {0.0, 1.0} <= shares
    # The command names every file it wrote.
    for line in analyzed.stdout.splitlines():
        if line.startswith(str(tmp_path)):
            assert Path(line).is_file()


def test_eval_takes_what_was_found(
    analyzed: Result, tmp_path: Path, tiny_llava_folder: Path
) -> None:
    found = json.loads((tmp_path / "tiny" / "analysis.json").read_text())
    (entry,) = choices.choose_models(found["models_option"])
    assert entry.tsa_layers == tuple(found["text_salient_layers"])
    assert entry.folder == tiny_llava_folder.resolve()


def test_the_same_twice(analyzed: Result, tmp_path: Path) -> None:
    from kvbench.report.analysis import write_analysis

    folder = tmp_path / "tiny"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    write_analysis(copy)
    for path in folder.iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--samples 0", "--samples is 0"),
        ("--near -1", "--near is -1"),
        ("--data /no/such", "data root /no/such"),
        ("--models smol_lava", "smol_llava"),
        ("--device tpu", "tpu"),
    ],
)
def test_refuses(invoke: Invoke, words: str, says: str) -> None:
    result = invoke("analyze", *words.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_detector_of_another_library_is_refused(
    invoke: Invoke, tiny_llava_folder: Path, tmp_path: Path
) -> None:
    model = f"tiny={tiny_llava_folder}"
    words = ["--models", model, "--detector", "hf_quanto_int2", "--out", tmp_path]
    result = invoke("analyze", *words, "--device", "cpu")
    assert result.exit_code == 2
    assert "picks no pivots" in result.stderr
