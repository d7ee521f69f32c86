"""What a user can get wrong, end to end: exit code 2 and one line that says what, where and how."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from kvbench.cli import app
from kvbench.evaluation.store import Store, read_rows

Refused = Callable[..., str]
FOLDER = "ObjectExistence"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"KVBENCH_DATA": ""})


@pytest.fixture
def data(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the drawn tasks, to be broken."""
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def folder(tiny_llava_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny LLaVA's checkpoint, to be broken."""
    return Path(shutil.copytree(tiny_llava_folder, tmp_path / "checkpoint"))


@pytest.fixture
def refused(drawn: Path, tiny_llava_folder: Path, tmp_path: Path) -> Refused:
    """Runs `kvbench eval` on tiny things with some words changed; returns the complaint."""

    def check(**changes: object) -> str:
        words: dict[str, object] = {
            "models": f"tiny={tiny_llava_folder}",
            "methods": "fp16",
            "tasks": "oe",
            "data-root": drawn,
            "out": tmp_path / "run",
            "device": "cpu",
            "max-new-tokens": 2,
        }
        words |= {name.replace("_", "-"): value for name, value in changes.items()}
        typed = [word for name, value in words.items() for word in (f"--{name}", value)]
        result = run("eval", *typed)
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        complaints = [line for line in result.stderr.splitlines() if line.startswith("kvbench: ")]
        assert len(complaints) == 1
        assert result.stderr.endswith(complaints[0] + "\n")
        assert "Traceback" not in result.output
        assert "Mean" not in result.stdout  # no table of a run that didn't happen
        return complaints[0]

    return check


def rewrite(root: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Change the content of the annotation file."""
    path = root / FOLDER / f"{FOLDER}.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ({"methods": "kivy"}, "unknown method 'kivy': did you mean kivi?"),
        ({"methods": "kivi[bitz=2]"}, "did you mean bits?"),
        ({"methods": "kivi[bits=2.5]"}, "must be a whole number"),
        ({"methods": "akvq_vl[detector=eyes]"}, "eyes"),
        ({"methods": "akvq_vl[recent=-1]"}, "recent tokens can't be negative (-1)"),
        ({"methods": "akvq_vl[clip=1.5]"}, "clip must lie in (0, 1], not 1.5"),
        ({"methods": "rtn_int4[bits=5]"}, "5"),
        ({"methods": "rtn_int4[group_size=7]"}, "16 channels can't be cut into groups of 7"),
        ({"methods": "smoothquant[alpha=2]"}, "alpha must lie in [0, 1], not 2.0"),
        ({"models": "lava15_7b"}, "unknown model 'lava15_7b': did you mean llava15_7b"),
        ({"models": "llava15_7b"}, "not on this machine: download it with `hf download"),
        ({"models": "tiny=/no/such"}, "there is no model folder /no/such"),
        ({"tasks": "ooe"}, "unknown task 'ooe': did you mean"),
        ({"protocol": "exact"}, "did you mean exact_prefill?"),
        ({"limit": 0}, "--limit is 0: give at least 1"),
        ({"seed": -1}, "--seed is -1: give at least 0"),
        ({"batch": 0}, "--batch is 0: give at least 1"),
        ({"workers": 0}, "--workers is 0: give at least 1"),
        ({"gpus_per_worker": 0}, "--gpus-per-worker is 0: give at least 1"),
        ({"executor": "rya"}, "unknown executor 'rya': did you mean ray"),
        ({"address": "auto"}, "--address is of a Ray cluster: add --executor ray"),
        ({"max_new_tokens": 0}, "--max-new-tokens is 0: give at least 1"),
        ({"calibration_samples": 0}, "--calibration-samples is 0: give at least 1"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used"),
        ({"data_root": "/no/such"}, "data root /no/such does not exist"),
        ({"tasks": "oe,tqa"}, "task folder TQA is missing in data root"),
        ({"calibration": "/no/such"}, "calibration folder /no/such does not exist"),
    ],
)
def test_words(refused: Refused, tmp_path: Path, words: dict[str, object], part: str) -> None:
    assert part in refused(**words)
    assert not (tmp_path / "run" / "samples.jsonl").exists() or not read_rows(
        tmp_path / "run" / "samples.jsonl"
    )


def entry(content: dict[str, Any]) -> dict[str, Any]:
    """The second sample."""
    found: dict[str, Any] = content["data"][1]
    return found


def instance(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = entry(content)["task_instance"]
    return found


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (lambda c: c.pop("meta_data"), "meta_data"),
        (lambda c: c.update(data=[]), "no samples"),
        (lambda c: entry(c).pop("response"), "'response'"),
        (lambda c: instance(c).pop("context"), "'context'"),
        (lambda c: instance(c).pop("images_path"), "'images_path'"),
        (lambda c: instance(c).update(choice_list=None), "choice_list"),
        (lambda c: instance(c).update(choice_list=["yes", 1]), "choice_list"),
        (lambda c: instance(c).update(choice_list="yes"), "choice_list"),
        (lambda c: entry(c).update(sample_id="one"), "sample_id"),
        (lambda c: entry(c).update(sample_id=1.5), "sample_id"),
        (lambda c: entry(c).update(sample_id=0), "used twice"),
        (lambda c: entry(c).update(response="perhaps"), "'perhaps' is not among its 2 options"),
        (lambda c: entry(c).update(task_instruction_id=99), "task_instruction_id 99"),
        (lambda c: instance(c).update(context="{image#1} and {image#99}"), "image#99"),
        (lambda c: instance(c)["images_path"].append("none.png"), "none.png"),
        (lambda c: instance(c)["images_path"].insert(0, "../../secret.png"), "leads out of"),
        (lambda c: instance(c)["images_path"].insert(0, "/etc/passwd"), "leads out of"),
    ],
)
def test_annotations(refused: Refused, data: Path, edit: Any, part: str) -> None:
    path = rewrite(data, edit)
    complaint = refused(data_root=data)
    assert part in complaint
    assert str(path) in complaint


@pytest.mark.parametrize("content", [b"", b'{"data": [', b"[1]", b"\xff\xfe{}", b"[" * 100_000])
def test_annotations_that_are_no_json(refused: Refused, data: Path, content: bytes) -> None:
    path = data / FOLDER / f"{FOLDER}.json"
    path.write_bytes(content)
    assert str(path) in refused(data_root=data)


def image(root: Path) -> Path:
    """An image of the second sample."""
    names = json.loads((root / FOLDER / f"{FOLDER}.json").read_text())["data"][1]
    return root / FOLDER / "images" / names["task_instance"]["images_path"][0]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def paint_too_much(path: Path) -> None:
    Image.new("1", (9000, 9000)).save(path)


def bomb(path: Path) -> None:
    """A header that promises 40,000 by 40,000 pixels, and no pixels."""
    Image.new("1", (1, 1)).save(path, format="BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 40_000, 40_000)
    path.write_bytes(content)


def link_away(path: Path) -> None:
    outside = path.parents[3] / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (Path.unlink, "is not in"),
        (cut, "the image is damaged"),
        (lambda path: path.write_bytes(b"GIF89a"), "image"),
        (lambda path: path.write_text("a text"), "not an image of a known format"),
        (lambda path: os.truncate(path, 2**40), "too large for an image"),
        (paint_too_much, "9000 x 9000 pixels are too many"),
        (bomb, "pixels"),
        (link_away, "is a link that leaves"),
    ],
)
def test_images(refused: Refused, data: Path, tmp_path: Path, damage: Any, part: str) -> None:
    path = image(data)
    damage(path)
    complaint = refused(data_root=data)
    assert part in complaint
    assert path.name in complaint
    assert "sample 1" in complaint
    rows = tmp_path / "run" / "samples.jsonl"
    found = read_rows(rows) if rows.exists() else []
    assert {row.sample_id for row in found} <= {0}  # what came before the broken sample is kept


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert'"),
        (lambda f: (f / "model.safetensors").unlink(), "only safetensors weights are read"),
        (lambda f: cut(f / "model.safetensors"), "bytes instead of"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "can't read tokenizer"),
        (lambda f: (f / "processor_config.json").unlink(), "image processor"),
    ],
)
def test_model_folders(refused: Refused, folder: Path, damage: Any, part: str) -> None:
    damage(folder)
    complaint = refused(models=f"tiny={folder}")
    assert part in complaint
    assert str(folder) in complaint


def test_a_model_without_eyes(refused: Refused, tiny_text_folder: Path) -> None:
    assert "tiny takes no images" in refused(models=f"tiny={tiny_text_folder}")


def test_prompts_longer_than_the_model(refused: Refused, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = 128
    path.write_text(json.dumps(config))
    complaint = refused(models=f"tiny[max_context_len=4000]={folder}")
    assert "sample 0 of ObjectExistence has 507 tokens, but tiny reads 128" in complaint
    assert "lower max_context_len" in complaint
    complaint = refused(models=f"tiny[max_context_len=9]={folder}")
    assert "ObjectExistence, sample 0: the instruction alone has 40 tokens" in complaint


def test_folders_that_cannot_be_written(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in refused(out=tmp_path / "file")
    for out in (tmp_path / "file" / "run", Path("/proc/run")):
        assert f"can't use {out} for results" in refused(out=out)
    (tmp_path / "run" / "samples.jsonl").mkdir(parents=True)
    assert f"can't use {tmp_path / 'run'} for results" in refused()


def test_a_full_disk(refused: Refused, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: rows fit until it is reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        complaint = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rows = read_rows(tmp_path / "run" / "samples.jsonl")
    assert 0 < len(rows) < 6
    assert f"the {len(rows)} samples before are safe" in complaint


def test_a_second_process_on_the_same_run(refused: Refused, tmp_path: Path) -> None:
    with Store(tmp_path / "run"):
        assert f"is in use by process {os.getpid()}" in refused()
    assert read_rows(tmp_path / "run" / "samples.jsonl") == []


def test_rows_of_something_else_are_not_touched(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    rows = tmp_path / "run" / "samples.jsonl"
    rows.write_text('{"schema": 1, "key": "k"}\n{"mine": true}\n')
    assert "line 1" in refused()
    assert rows.read_text() == '{"schema": 1, "key": "k"}\n{"mine": true}\n'


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--models tiny=/no/such", "there is no model folder /no/such"),
        ("--models smol_lava", "did you mean smol_llava"),
        ("--methods kivy", "did you mean kivi?"),
        ("--samples 0", "--samples is 0"),
        ("--data /no/such", "data root /no/such does not exist"),
        ("--out /proc/kept --samples 1", "can't be written"),
    ],
)
def test_calibrate(
    tiny_llava_folder: Path, private_cache: Path, tmp_path: Path, words: str, part: str
) -> None:
    folders = ["--models", f"tiny={tiny_llava_folder}", "--out", tmp_path / "kept"]
    result = run("calibrate", *folders, "--device", "cpu", *words.split())
    assert result.exit_code == 2, result.output
    assert part in result.stderr.splitlines()[-1]
