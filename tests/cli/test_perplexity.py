"""`kvbench perplexity` and its table, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(str(n * n) for n in range(120)), encoding="utf-8")
    return path


def words(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    """The command, on a tiny model."""
    command = ["perplexity", "--model", f"tiny={folder}", "--text", str(text), "--out", str(out)]
    small = ["--window", "32", "--context", "24", "--limit", "2", "--device", "cpu"]
    return [*command, *small, "--methods", "rtn_int2", *more]


def test_a_table_of_both_protocols(
    invoke: Any,
    tiny_text_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["kvbench", "perplexity", "--protocol", "both"])
    done = invoke(*words(tiny_text_folder, text_file, out, "--protocol", "both"))
    assert done.exit_code == 0, done.output
    for title in ("tiny, quantized_prefill, numbers.txt", "tiny, exact_prefill, numbers.txt"):
        assert title in done.stdout
    assert done.stdout.count("RTN (INT2)") == done.stdout.count("| FP16") == 2
    markdown = (out / "perplexity.md").read_text(encoding="utf-8")
    assert "- command: `kvbench perplexity --protocol both`" in markdown
    assert "the first 24 tokens of a window are a prompt (exact attention within" in markdown
    assert "KL(FP16 || method) in nats" in markdown
    again = invoke("report", out)
    assert again.exit_code == 0 and again.stdout == done.stdout


def test_neither_lm_eval_nor_datasets_is_needed(
    tiny_text_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('lm_eval', 'datasets')));"
        "from kvbench.__main__ import main; main()"
    )
    command = [sys.executable, "-c", code, *words(tiny_text_folder, text_file, tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RTN (INT2)" in done.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--text", "/nowhere.txt"), "can't read the text /nowhere.txt"),
        (("--protocol", "streaming"), "unknown protocol 'streaming'"),
        (("--methods", "kivvi"), "did you mean kivi"),
        (("--model", "smollm3"), "did you mean smollm2"),
        (("--model", "smollm2,llava15_7b"), "names 2 models: name one"),
        (("--window", "2"), "--window is 2: give at least 4"),
        (("--protocol", "both", "--context", "32"), "leaves nothing of a window of 32"),
    ],
)
def test_bad_input(
    invoke: Any,
    tiny_text_folder: Path,
    text_file: Path,
    tmp_path: Path,
    option: tuple[str, ...],
    message: str,
) -> None:
    done = invoke(*words(tiny_text_folder, text_file, tmp_path / "run", *option))
    assert done.exit_code == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_lm_eval_refuses_what_never_reads_a_cache(invoke: Any, tmp_path: Path) -> None:
    (tmp_path / "choose.yaml").write_text(
        "task: choose\noutput_type: multiple_choice\ndataset_path: json\n", encoding="utf-8"
    )
    done = invoke("lm-eval", "--tasks", "choose", "--include", tmp_path, "--methods", "rtn_int2")
    assert done.exit_code == 2
    assert "choose asks for multiple_choice" in done.stderr and "lossless" in done.stderr


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--protocol", "both"), "one model under one protocol"),
        (("--include", "/nowhere"), "task folder /nowhere is no folder"),
        (("--limit", "0"), "--limit is 0"),
    ],
)
def test_bad_input_of_lm_eval(invoke: Any, option: tuple[str, ...], message: str) -> None:
    done = invoke("lm-eval", "--tasks", "x", "--methods", "fp16", *option)
    assert done.exit_code == 2 and message in done.stderr
