"""``kvbench tune`` on a tiny model: sizes, a killed run, and the preset in use."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from kvbench.cache import bind
from kvbench.evaluation import choices
from kvbench.evaluation.decode import prefill
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.models.load import load_model
from kvbench.tuning.objective import Judge

Invoke = Callable[..., Result]


@pytest.fixture
def words(data: Path, tiny_llava_folder: Path, tmp_path: Path) -> list[Any]:
    found = ["tune", "--models", f"tiny={tiny_llava_folder}", "--data", data, "--device", "cpu"]
    found += ["--tasks", "oe,wqa", "--samples", 3, "--max-new-tokens", 3, "--clusters", 2]
    return [*found, "--trials", 6, "--out", tmp_path]


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_killed_search_goes_on_and_its_preset_is_used(
    invoke: Invoke,
    words: list[Any],
    data: Path,
    tiny_llava_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    outcome = Judge.outcome

    def interrupted(self: Judge, method: Any) -> Any:
        calls.append(method.pairs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return outcome(self, method)

    monkeypatch.setattr(Judge, "outcome", interrupted)
    assert invoke(*words, "--bits", 7).exit_code == 130
    folder = tmp_path / "tiny"
    assert not (folder / "preset.json").exists()
    result = invoke(*words, "--bits", 7)
    assert result.exit_code == 0, result.output
    assert "3 of 6 tables are there already" in result.stderr
    assert len(calls) == 7

    trials, front = table(folder, "trials"), table(folder, "front")
    assert len({line["method"] for line in trials}) == 6
    assert all(float(line["bits"]) <= 7 for line in trials)
    losses = [float(line["kl_mean"]) for line in front]
    assert losses == sorted(losses, reverse=True)
    best = json.loads((folder / "preset.json").read_text())
    assert losses[-1] == min(float(line["kl_mean"]) for line in trials)
    assert best["kl_mean"] == pytest.approx(losses[-1], rel=1e-5)
    text = (folder / "front.md").read_text()
    assert "kvtuner[preset=" in text
    assert "tables on 3 prompts of" in text
    for line in result.stdout.splitlines():
        if line.startswith(str(tmp_path)):
            assert Path(line).is_file()

    # The preset's promised size is that of a cache on the same prompts.
    (choice,) = choices.choose_methods(f"kvtuner[preset={folder / 'preset.json'}]")
    assert choice.spec == front[-1]["method"]
    loaded = load_model(choices.choose_models(f"tiny={tiny_llava_folder}")[0])
    method = bind(loaded.model, choice.quantizer)  # type: ignore[arg-type]
    found = []
    for name, count in (("oe", 2), ("wqa", 1)):
        cell = read_cell(name, data, 2, 0)
        for sample in cell.samples[:count]:
            cache = method.new_cache()
            prefill(loaded.model, encoded(loaded, [ask(loaded, cell.task, sample)]), cache)
            found.append((cache.bits_per_element(), cache.nbytes()))
    bits, nbytes = (sum(values) / 3 for values in zip(*found, strict=True))
    assert best["bits"] == pytest.approx(bits)
    assert best["cache_bytes"] == pytest.approx(nbytes, abs=1)

    refused = invoke(*words, "--bits", 6)
    assert refused.exit_code == 2
    assert "holds a search with another bits (7.0)" in refused.stderr


def test_a_budget_in_bytes_is_the_same_budget(
    invoke: Invoke, words: list[Any], tmp_path: Path
) -> None:
    words = [*words, "--objective", "accuracy", "--protocol", "exact_prefill"]
    result = invoke(*words, "--bytes", 60_000)
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "tiny"
    found = json.loads((folder / "tune.json").read_text())
    for line in table(folder, "trials"):
        assert int(line["cache_bytes"]) <= 60_000
        ratio = int(line["cache_bytes"]) / float(line["bits"])
        assert 60_000 / ratio == pytest.approx(found["budget"], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--bits 3 --bytes 1000", "one budget"),
        ("--bits -1", "positive"),
        ("--trials 0", "--trials is 0"),
        ("--method akvq_vl", "has no choices for single layers"),
        ("--method kvtuner,kivi", "one method"),
        ("--protocol both", "one protocol"),
        ("--bits 1", "the smallest table stores"),
    ],
)
def test_refuses(invoke: Invoke, words: list[Any], given: str, says: str) -> None:
    result = invoke(*words, *given.split())
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("kvbench: ")
    assert says in last
