"""A batch through prepared methods: identity of rows, what runs and what doesn't."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.cache import Calibration
from kvbench.evaluation import runner
from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.decode import Answer
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.rows import SampleRow, row_key
from kvbench.evaluation.runner import BatchRunner, PreparedMethod
from kvbench.evaluation.samples import Cell, Question, ask, read_cell
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.tasks.minimile import VERSION


class Rows(dict[str, SampleRow]):
    """A sink in memory."""

    def has(self, key: str) -> bool:
        return key in self

    def append(self, row: SampleRow) -> bool:
        self[row.key] = row
        return True


@pytest.fixture(scope="module")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_llava_folder}"))


@pytest.fixture(scope="module")
def cell(drawn: Path) -> Cell:
    return read_cell("oe", drawn, None, 0)


@pytest.fixture(scope="module")
def questions(loaded: LoadedModel, cell: Cell) -> list[Question]:
    return [ask(loaded, cell.task, sample) for sample in cell.samples]


@pytest.fixture
def prepared(loaded: LoadedModel) -> Callable[..., list[PreparedMethod]]:
    def make(text: str, *protocols: str) -> list[PreparedMethod]:
        return [
            PreparedMethod.of(loaded, choice, protocol, None)
            for protocol in protocols or ("quantized_prefill",)
            for choice in choose_methods(text)
        ]

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(rows, whether there were references) of each batch that is answered."""
    found: list[tuple[int, bool]] = []
    answer = runner.answer

    def watched(
        model: Any, inputs: Any, cache: Any, limits: Any, references: Any, *more: Any
    ) -> Any:
        found.append((inputs.input_ids.shape[0], references is not None))
        return answer(model, inputs, cache, limits, references, *more)

    monkeypatch.setattr(runner, "answer", watched)
    return found


def test_references_and_storage(prepared) -> None:
    sixteen, packed = prepared("fp16,kivi")
    assert (sixteen.is_reference, packed.is_reference) == (True, False)
    assert sixteen.storage == packed.storage == "packed"
    assert sixteen.peer is packed.peer is None


def test_a_row_is_known_by_all_that_could_change_it(loaded, cell, questions, prepared) -> None:
    sink = Rows()
    methods = prepared("rtn_int2[bits=1]", "exact_prefill")
    BatchRunner(loaded, cell, methods, sink, Silent(), 8, 3).run(questions[1:2])
    (row,) = sink.values()
    assert row.key == row_key(
        model="tiny",
        revision=loaded.revision,
        dtype="float32",
        method="rtn_int2[bits=1]",
        protocol="exact_prefill",
        dataset=f"minimile-{VERSION}-seed0",
        task="oe",
        task_version=cell.task.version,
        sample_id=1,
        prompt_style=loaded.prompt_label,
        prompt_sha256=questions[1].prompt_sha256,
        images_sha256=questions[1].images_sha256,
        generation={"max_new_tokens": 3, "min_new_tokens": 1, "do_sample": False},
        calibration="",
        batch=8,
        version=row.version,
    )
    assert row.generated_tokens == 3
    assert row.answer is not None and row.answer == row.answer.strip()
    assert set(row.seconds) == {"prefill", "decode"}


@pytest.mark.parametrize(
    ("dataset", "tokens"), [("milebench", 512), (f"minimile-{VERSION}-seed0", 16)]
)
def test_longest_answers_by_default(
    loaded, cell, questions, prepared, monkeypatch, dataset, tokens
):
    asked = []

    def stopped(*arguments: Any) -> Any:
        asked.append(arguments[3].max_new_tokens)
        raise MemoryError

    monkeypatch.setattr(runner, "answer", stopped)
    named = dataclasses.replace(cell, dataset=dataset)
    sink = Rows()
    BatchRunner(loaded, named, prepared("fp16"), sink, Silent(), 1, None).run(questions[:1])
    assert asked == [tokens]
    assert [row.generation["max_new_tokens"] for row in sink.values()] == [tokens]


def test_a_batch_with_a_row_missing_runs_whole(loaded, cell, questions, prepared, calls) -> None:
    """Sixteen bits lack one sample, the method another: both are measured on the same batch."""
    sink, methods = Rows(), prepared("fp16,rtn_int2")
    batch = BatchRunner(loaded, cell, methods, sink, Silent(), 3, 3)
    batch.run(questions[:3])
    assert calls == [(3, False), (3, True)]
    before = dict(sink)
    for method, sample in (("fp16", 0), ("rtn_int2", 2)):
        (key,) = (k for k, row in sink.items() if (row.method, row.sample_id) == (method, sample))
        del sink[key]
    calls.clear()
    batch.run(questions[:3])
    assert calls == [(3, False), (3, True)]
    strip = {key: dataclasses.replace(row, seconds={}) for key, row in sink.items()}
    assert strip == {key: dataclasses.replace(row, seconds={}) for key, row in before.items()}


def test_only_what_is_missing_runs(loaded, cell, questions, prepared, calls, listener) -> None:
    both = ("quantized_prefill", "exact_prefill")
    sink, methods = Rows(), prepared("fp16,rtn_int2,rtn_int4", *both)
    batch = BatchRunner(loaded, cell, methods, sink, listener, 1, 3)
    batch.run(questions[:1])
    assert (len(sink), listener.advanced) == (6, 6)
    lost = next(k for k, r in sink.items() if (r.method, r.protocol) == ("rtn_int4", both[1]))
    del sink[lost]
    calls.clear()
    batch.run(questions[:1])
    assert calls == [(1, False), (1, True)]
    assert (len(sink), listener.advanced) == (6, 12)
    calls.clear()
    batch.run(questions[:1])
    assert calls == []


def test_images_are_opened_once_a_batch(loaded, cell, questions, prepared, monkeypatch) -> None:
    encoded, opened = runner.encoded, []

    def watched(*arguments: Any) -> Any:
        opened.append(1)
        return encoded(*arguments)

    monkeypatch.setattr(runner, "encoded", watched)
    methods = prepared("fp16,rtn_int2,kivi", "quantized_prefill", "exact_prefill")
    BatchRunner(loaded, cell, methods, Rows(), Silent(), 2, 2).run(questions[:2])
    assert opened == [1]


def test_means_need_every_position() -> None:
    reference = Answer([5, 6], [torch.zeros(3)] * 3)
    assert runner._mean_divergence(Answer(divergences=[0.5, 1.0, 3.0]), reference) == 1.5
    assert runner._mean_divergence(Answer(divergences=[0.5, 1.0]), reference) is None
    assert runner._mean_divergence(Answer(divergences=[]), Answer()) is None
    assert runner._mean_divergence(Answer(divergences=[0.5]), None) is None


def test_calibrations_are_told_apart() -> None:
    numbers = {"key_min": torch.ones(2, 2, 4), "key_max": torch.zeros(2, 2, 4)}
    one = runner._fingerprint(Calibration(numbers, {"seed": "0"}))
    assert len(one) == 12 and int(one, 16) >= 0
    assert runner._fingerprint(Calibration(dict(reversed(numbers.items())), {"seed": "0"})) == one
    assert runner._fingerprint(Calibration(numbers, {"seed": "1"})) != one
    other = numbers | {"key_max": torch.full((2, 2, 4), 1e-6)}
    assert runner._fingerprint(Calibration(other, {"seed": "0"})) != one
    assert runner._fingerprint(None) == ""
