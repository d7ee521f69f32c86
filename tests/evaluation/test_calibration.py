"""Calibration by `eval` itself and by `kvbench calibrate`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvbench.cache import load_calibration, save_calibration
from kvbench.cache.contract import Calibration
from kvbench.cli import app
from kvbench.errors import UserError
from kvbench.evaluation import calibration as calibration_module
from kvbench.evaluation import session
from kvbench.evaluation.calibration import calibrate, statistics_of
from kvbench.evaluation.choices import choose_methods, choose_models
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import CalibrationRequest
from kvbench.evaluation.rows import SampleRow
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.tasks.minimile import CALIBRATION_SEED, FOLDERS, VERSION, draw, sample_rng

Evaluated = Callable[..., list[SampleRow]]
NEEDED = ("key_min", "key_max", "value_min", "value_max", "key_absmax", "query_absmax")
NEEDED += ("value_absmax", "output_weight_absmax")
GRID: dict[str, Any] = {"methods": "fp16,smoothquant,skvq[window=8]", "tasks": "oe", "limit": 2}


@pytest.fixture(scope="module")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_llava_folder}"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever statistics are gathered, by the number of samples."""
    found: list[int] = []
    gather = session.statistics_of

    def counted(loaded: Any, names: Any, samples: int, *more: Any) -> Any:
        found.append(samples)
        return gather(loaded, names, samples, *more)

    monkeypatch.setattr(session, "statistics_of", counted)
    return found


def test_eval_calibrates_once_and_says_so(
    evaluated: Evaluated, listener: Any, made: list[int], private_cache: Path, tmp_path: Path
) -> None:
    rows = evaluated(listener, **GRID)
    assert made == [3]
    (note,) = listener.notes
    assert "calibrating tiny for smoothquant, skvq[window=8] on 3 samples" in note
    assert "which no task scores" in note
    kept = tmp_path / "run" / "calibration" / "tiny.safetensors"
    content = kept.read_bytes()
    prints = {row.method: row.calibration for row in rows}
    assert prints["fp16"] == ""
    assert "" != prints["smoothquant"] != prints["skvq[window=8]"] != ""

    again = evaluated(listener, **GRID | {"limit": 3, "calibration_samples": 5})
    assert made == [3] and len(listener.notes) == 1
    assert kept.read_bytes() == content
    assert again[: len(rows)] == rows
    assert {row.calibration for row in again} == set(prints.values())


def test_what_another_method_needs_is_added_and_changes_no_row(
    evaluated: Evaluated, listener: Any, made: list[int], private_cache: Path, tmp_path: Path
) -> None:
    first = evaluated(listener, **GRID | {"methods": "fp16,skvq[window=8]"})
    kept = tmp_path / "run" / "calibration" / "tiny.safetensors"
    before = load_calibration(kept)
    assert set(before.statistics) == {"key_min", "key_max", "value_min", "value_max"}
    again = evaluated(listener, **GRID | {"calibration_samples": 5, "seed": 0})
    after = load_calibration(kept)
    assert made == [3, 3]  # on the samples that the file was made with
    assert after.manifest == before.manifest
    assert set(after.statistics) > set(before.statistics)
    same = [row for row in again if row.method in ("fp16", "skvq[window=8]")]
    assert sorted(row.key for row in same) == sorted(row.key for row in first)


def test_the_verb_gathers_what_the_methods_need(
    private_cache: Path, tmp_path: Path, tiny_llava_folder: Path
) -> None:
    request = CalibrationRequest(
        methods=choose_methods("skvq"),
        models=choose_models(f"tiny={tiny_llava_folder}"),
        out=tmp_path / "out",
        samples=1,
        device="cpu",
    )
    (path,) = calibrate(request, Silent())
    assert set(load_calibration(path).statistics) == set(NEEDED[:4])
    with pytest.raises(UserError, match="nothing to calibrate"):
        list(calibrate(replace(request, methods=choose_methods("kivi,fp16")), Silent()))


def test_a_file_that_lacks_what_a_method_needs_is_named(
    evaluated: Evaluated, loaded: LoadedModel, private_cache: Path, tmp_path: Path
) -> None:
    found = statistics_of(loaded, NEEDED[:4], 1, 0)
    save_calibration(found, tmp_path / "kept" / "tiny.safetensors")
    with pytest.raises(UserError, match=r"lacks .*query_absmax.*; run `kvbench calibrate`"):
        evaluated(**GRID, calibration=tmp_path / "kept")


def test_without_such_methods_nothing_is_calibrated(
    evaluated: Evaluated, made: list[int], private_cache: Path, tmp_path: Path
) -> None:
    evaluated(methods="fp16,kivi", tasks="oe", limit=1)
    assert made == []
    assert not (tmp_path / "run" / "calibration").exists()
    assert not private_cache.exists()


def test_statistics_of_another_revision_are_refused(
    evaluated: Evaluated, loaded: LoadedModel, private_cache: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept" / "tiny.safetensors"
    found = statistics_of(loaded, NEEDED, 1, 0)
    other = Calibration(found.statistics, {**found.manifest, "revision": "another"})
    save_calibration(other, kept)
    with pytest.raises(UserError, match=f"{kept} was made for revision another of tiny, not"):
        evaluated(**GRID, calibration=tmp_path / "kept")
    save_calibration(found, kept)
    assert len(evaluated(**GRID, calibration=tmp_path / "kept")) == 3 * 2


@pytest.mark.parametrize(
    ("content", "part"), [(None, "no calibration can be read"), (b"torn", "no calibration")]
)
def test_statistics_that_cannot_be_read(
    evaluated: Evaluated, tmp_path: Path, content: bytes | None, part: str
) -> None:
    (tmp_path / "kept").mkdir()
    if content is not None:
        (tmp_path / "kept" / "tiny.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=part):
        evaluated(**GRID, calibration=tmp_path / "kept")


def test_statistics_that_cannot_be_kept(
    evaluated: Evaluated, private_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "calibration").write_text("in the way")
    with pytest.raises(UserError, match="calibration can't be written"):
        evaluated(**GRID)


def test_the_split_shares_no_image_with_the_scored_set() -> None:
    """200 samples a task are scored by default, 32 are drawn for calibration."""

    def images(seed: int, samples: int) -> set[bytes]:
        return {
            hashlib.sha256(image.tobytes()).digest()
            for folder in FOLDERS
            for index in range(samples)
            for image in draw(folder, sample_rng("test", folder, seed, index)).images
        }

    scored, split = images(0, 200), images(CALIBRATION_SEED, 32)
    assert len(split) > 32 * 12
    assert not scored & split


def test_prompts_come_from_all_tasks_evenly(
    loaded: LoadedModel, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, asked = calibration_module.ask, []

    def watched(model: Any, task: Any, sample: Any) -> Any:
        asked.append((task.name, sample.images[0].parts[-4]))
        return ask(model, task, sample)

    monkeypatch.setattr(calibration_module, "ask", watched)
    found = statistics_of(loaded, ["key_min"], 14, 0)
    counts = [sum(name == task for name, _ in asked) for task in dict(asked)]
    assert len(asked) == 14 and max(counts) == 2
    assert {folder for _, folder in asked} == {f"minimile-{VERSION}-seed{CALIBRATION_SEED}-14"}
    assert found.manifest == {
        "model": "tiny",
        "revision": loaded.revision,
        "data": f"minimile-{VERSION}-seed{CALIBRATION_SEED}-14",
        "seed": "0",
        "prompts": "14",
    }


def test_extremes_are_those_of_the_prompts(
    loaded: LoadedModel, private_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of the first layer, gathered by a hook on the projection itself."""
    seen: list[torch.Tensor] = []
    layer = loaded.model.model.language_model.layers[0].self_attn.v_proj
    handle = layer.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    try:
        found = statistics_of(loaded, NEEDED, 2, 0)
    finally:
        handle.remove()
    values = torch.cat([out[0].view(-1, 2, 16) for out in seen])
    assert len(seen) == 2
    assert torch.equal(found.statistics["value_min"][0], values.amin(0))
    assert torch.equal(found.statistics["value_max"][0], values.amax(0))
    assert torch.equal(found.statistics["value_absmax"][0], values.abs().amax(0))


def test_data_of_the_users_own(
    loaded: LoadedModel, private_cache: Path, tmp_path: Path, tiny_llava_folder: Path
) -> None:
    from kvbench.tasks.minimile import make

    make(tmp_path / "mine", seed=4, samples=1)
    request = CalibrationRequest(
        methods=choose_methods("skvq"),
        models=choose_models(f"tiny={tiny_llava_folder}"),
        out=tmp_path / "out",
        data_root=tmp_path / "mine",
        samples=4,
        device="cpu",
    )
    (path,) = calibrate(request, Silent())
    assert load_calibration(path).manifest["data"] == "mine"
    assert not private_cache.exists()
    shutil.rmtree(tmp_path / "mine" / "TQA")
    with pytest.raises(UserError, match="TQA is missing"):
        list(calibrate(request, Silent()))


def test_the_verb_writes_what_eval_reads(
    drawn: Path,
    private_cache: Path,
    tiny_llava_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVBENCH_DATA", str(drawn))  # what is scored is not calibrated on

    def run(*words: object) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result

    model = f"tiny={tiny_llava_folder}"
    kept = tmp_path / "kept"
    result = run("calibrate", "--models", model, "--out", kept, "--samples", 2, "--device", "cpu")
    assert result.stdout.splitlines() == [str(kept / "tiny.safetensors")]
    data = load_calibration(kept / "tiny.safetensors").manifest["data"]
    assert data == f"minimile-{VERSION}-seed{CALIBRATION_SEED}-2"
    words = ["--methods", "fp16,smoothquant", "--tasks", "oe", "--limit", 1, "--device", "cpu"]
    run(
        "eval", "--models", model, "--data-root", drawn, "--max-new-tokens", 3, *words,
        "--out", tmp_path / "run", "--calibration", kept,
    )  # fmt: skip
    assert not (tmp_path / "run" / "calibration").exists()
    assert "SmoothQuant" in (tmp_path / "run" / "table2.md").read_text()
