"""The grid on tiny models: which rows come of it, and what they say of storage and answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.errors import Mistake, UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.runner import PreparedMethod
from kvbench.evaluation.store import read_rows
from kvbench.report import write_report
from kvbench.tasks.minimile import VERSION

Evaluated = Callable[..., list[SampleRow]]
BOTH = ("quantized_prefill", "exact_prefill")
LAYERS, HEADS, WIDTH, FLOAT = 3, 2, 16, 4  # of the tiny models' caches


def said(rows: list[SampleRow]) -> dict[tuple[Any, ...], Any]:
    """What each row says, but for the time it took."""
    return {
        (row.model, row.method, row.protocol, row.task, row.sample_id): {
            **vars(row),
            "seconds": set(row.seconds),
        }
        for row in rows
    }


def test_every_cell_of_the_grid_has_its_rows(
    evaluated: Evaluated,
    listener: Any,
    private_cache: Path,
    tiny_llava_folder: Path,
    tiny_llava_next_folder: Path,
) -> None:
    methods = ["fp16", "rtn_int4", "smoothquant", "akvq_vl[recent=64]"]
    rows = evaluated(
        listener,
        methods=",".join(methods),
        models=f"one={tiny_llava_folder},two={tiny_llava_next_folder}",
        protocols=BOTH,
        limit=1,
    )
    found = {(row.model, row.method, row.task, row.protocol) for row in rows}
    assert found == set(itertools.product(("one", "two"), methods, ("oe", "wqa"), BOTH))
    assert len(rows) == len({row.key for row in rows}) == 2 * 4 * 2 * 2
    assert {row.status for row in rows} == {"ok"}
    assert {row.dataset for row in rows} == {f"minimile-{VERSION}-seed0"}
    assert (listener.total, listener.advanced) == (32, 32)
    assert listener.cells == ["one · OE", "one · WQA", "two · OE", "two · WQA"]


@pytest.mark.parametrize("protocol", BOTH)
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_are_what_the_formats_take(evaluated: Evaluated, protocol: str, batch: int) -> None:
    """16-bit storage in float32; codes with a float16 scale and an int16 zero point a vector."""
    methods = {"fp16": WIDTH * FLOAT}
    for name, bits in {"rtn_int4": 4, "rtn_int2": 2, "rtn_int2[bits=1]": 1}.items():
        methods[name] = WIDTH * bits // 8 + 2 + 2
    rows = evaluated(methods=",".join(methods), protocols=(protocol,), limit=3, batch=batch)
    for row in rows:
        vectors = row.prompt_tokens * LAYERS * HEADS * 2
        assert row.cache_bytes == vectors * methods[row.method]
        assert row.bits_per_element == 8 * methods[row.method] / WIDTH
        assert row.images_kept == row.images_total > 0
        assert row.prompt_tokens > 16 * row.images_kept


def test_one_bit_destroys_answers_and_sixteen_do_not(evaluated: Evaluated) -> None:
    rows = evaluated(methods="rtn_int2[bits=1],fp16")
    reference = {(row.task, row.sample_id): row for row in rows if row.method == "fp16"}
    broken = [row for row in rows if row.method != "fp16"]
    assert len(reference) == len(broken) == 12
    for row in reference.values():
        assert row.packed_tokens_read == 0
        assert (row.kl_first, row.kl_mean, row.agrees) == (None, None, None)
    for row in broken:
        same = row.answer == reference[row.task, row.sample_id].answer
        assert row.agrees is same
        assert row.packed_tokens_read and row.packed_tokens_read >= LAYERS * row.prompt_tokens
        assert row.kl_first is not None and row.kl_mean is not None
    assert sum(row.agrees is False for row in broken) >= 6
    assert sum(row.kl_mean or 0 for row in broken) / 12 > 0.1


def test_more_bits_lie_closer(evaluated: Evaluated) -> None:
    rows = evaluated(methods="fp16,rtn_int4[bits=8],rtn_int4,rtn_int2", tasks="oe", limit=3)
    mean = {
        method: sum(row.kl_mean or 0 for row in rows if row.method == method)
        for method in ("rtn_int4[bits=8]", "rtn_int4", "rtn_int2")
    }
    assert 0 < mean["rtn_int4[bits=8]"] < mean["rtn_int4"] < mean["rtn_int2"]


def test_without_sixteen_bits_nothing_is_compared(evaluated: Evaluated) -> None:
    for row in evaluated(methods="rtn_int2", limit=1):
        assert (row.status, row.kl_first, row.kl_mean, row.agrees) == ("ok", None, None, None)


def test_order_of_methods_does_not_matter(evaluated: Evaluated, tmp_path: Path) -> None:
    orders = ("fp16,rtn_int2,kivi", "kivi,rtn_int2,fp16")
    first, second = (
        evaluated(methods=order, protocols=BOTH, limit=1, out=tmp_path / str(place))
        for place, order in enumerate(orders)
    )
    assert said(first) == said(second)
    assert [row.method for row in second[:3]] == ["fp16", "kivi", "rtn_int2"]


def test_batches_hardly_change_a_row(evaluated: Evaluated, tmp_path: Path) -> None:
    """Keys differ, since the batch is part of a row's identity; everything else is the same."""
    options: dict[str, Any] = {
        "methods": "fp16,rtn_int2,akvq_vl[recent=64]",
        "tasks": "oe",
        "limit": 3,
    }
    one = said(evaluated(out=tmp_path / "1", **options))
    three = said(evaluated(out=tmp_path / "3", batch=3, **options))
    assert one.keys() == three.keys()
    for name, row in one.items():
        other = three[name]
        assert row["key"] != other["key"]
        for field in ("answer", "correct", "agrees", "prompt_tokens", "cache_bytes"):
            assert row[field] == other[field], field
        for field in ("bits_per_element", "packed_tokens_read", "kl_first", "kl_mean"):
            expected = row[field] if row[field] is None else pytest.approx(row[field], rel=0.02)
            assert other[field] == expected, field


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
def test_an_image_is_encoded_once(
    request: pytest.FixtureRequest,
    evaluated: Evaluated,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    from kvbench.evaluation import session

    folder, load, seen = request.getfixturevalue(f"tiny_{family}_folder"), session.load, []

    def hooked(*arguments: Any) -> Any:
        loaded = load(*arguments)
        inner = loaded.model.model
        tower = inner.visual if family == "qwen2_vl" else inner.vision_tower
        tower.register_forward_hook(lambda *_: seen.append(1))
        return loaded

    monkeypatch.setattr(session, "load", hooked)
    rows = evaluated(methods="fp16,rtn_int4,kivi", models=f"tiny={folder}", protocols=BOTH, limit=2)
    assert len(rows) == 3 * 2 * 2 * 2
    assert len(seen) == 2 * 2  # one pass over all images of each sample


def test_run_json_says_what_was_asked(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/kvbench", "eval", "--methods", "a b"])
    evaluated(methods="fp16,kivi", limit=1, seed=3)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    request = run["request"]
    assert request["methods"] == ["fp16", "kivi"]
    assert request["samples"] == {"oe": 1, "wqa": 1}
    assert request["seed"] == 3
    assert request["command"] == "kvbench eval --methods 'a b'"
    assert set(run["environment"]) >= {"python", "packages", "cpus"}


def test_limit_and_seed_choose_the_samples(evaluated: Evaluated, tmp_path: Path) -> None:
    def chosen(name: str, **options: Any) -> dict[str, list[int]]:
        rows = evaluated(out=tmp_path / name, **options)
        return {task: [row.sample_id for row in rows if row.task == task] for task in ("oe", "wqa")}

    first = chosen("first", limit=3, seed=5)
    assert first == chosen("again", limit=3, seed=5)
    assert first != chosen("other", limit=3, seed=6)
    assert {len(ids) for ids in first.values()} == {3}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("too much\nfor it"), MemoryError()])
def test_out_of_memory_is_a_status_and_is_tried_again(
    evaluated: Evaluated,
    listener: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
) -> None:
    new_cache = PreparedMethod.new_cache

    def limited(self: PreparedMethod, model: Any) -> Any:
        if self.spec == "rtn_int4":
            raise error
        return new_cache(self, model)

    methods = "fp16,rtn_int4,rtn_int2"
    with monkeypatch.context() as patch:
        patch.setattr(PreparedMethod, "new_cache", limited)
        rows = evaluated(listener, methods=methods, limit=1)
    assert (listener.total, listener.advanced) == (6, 6)
    assert {row.method: row.status for row in rows} == {
        "fp16": "ok",
        "rtn_int4": "oom",
        "rtn_int2": "ok",
    }
    failed = [row for row in rows if row.status == "oom"]
    assert len(failed) == 2
    assert {row.error for row in failed} == {str(error).split("\n")[0] or "MemoryError"}
    assert all(row.answer is None and row.images_kept > 0 for row in failed)
    write_report(tmp_path / "run")
    (line,) = (
        line
        for line in (tmp_path / "run" / "table2.md").read_text().splitlines()
        if line.startswith("| RTN (INT4)")
    )
    assert line.count("OOM") >= 2

    again = evaluated(methods=methods, limit=1)
    assert {row.status for row in again} == {"ok"}
    assert said(again) == said(evaluated(methods=methods, limit=1, out=tmp_path / "calm"))


def test_sixteen_bits_out_of_memory_leave_the_others_their_answers(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_cache = PreparedMethod.new_cache

    def limited(self: PreparedMethod, model: Any) -> Any:
        if self.is_reference:
            raise torch.OutOfMemoryError("full")
        return new_cache(self, model)

    monkeypatch.setattr(PreparedMethod, "new_cache", limited)
    rows = {row.method: row for row in evaluated(methods="fp16,rtn_int2", tasks="oe", limit=1)}
    assert rows["fp16"].status == "oom"
    assert rows["rtn_int2"].status == "ok"
    assert (rows["rtn_int2"].kl_mean, rows["rtn_int2"].agrees) == (None, None)


def test_a_methods_fault_is_a_status_and_told_when_all_is_done(
    evaluated: Evaluated, listener: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    new_cache = PreparedMethod.new_cache

    def clumsy(self: PreparedMethod, model: Any) -> Any:
        if self.spec == "rtn_int4":
            torch.nn.Linear(2, 3)(torch.zeros(5))
        return new_cache(self, model)

    methods, file = "fp16,rtn_int4,rtn_int2", tmp_path / "run" / "samples.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Mistake) as told:
        patch.setattr(PreparedMethod, "new_cache", clumsy)
        evaluated(listener, methods=methods, limit=2)
    assert "rtn_int4 failed 4 times (RuntimeError: mat1" in str(told.value)
    assert f"{__file__}:{clumsy.__code__.co_firstlineno + 2}" in str(told.value)
    assert (listener.total, listener.advanced) == (12, 12)
    assert sum(note.startswith("rtn_int4, sample ") for note in listener.notes) == 4
    rows = read_rows(file)
    assert {(row.method, row.status) for row in rows} == {
        ("fp16", "ok"), ("rtn_int4", "error"), ("rtn_int2", "ok"),
    }  # fmt: skip
    write_report(tmp_path / "run")
    assert "| error" in (tmp_path / "run" / "table2.md").read_text()
    # Rows of an earlier run are no reason to end badly, and what was mended runs again.
    evaluated(methods="fp16,rtn_int2", limit=2)
    evaluated(methods=methods, limit=2, tasks="oe")
    assert {row.status for row in evaluated(methods=methods, limit=2)} == {"ok"}


def test_a_fault_of_the_program_is_not_a_status(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: PreparedMethod, model: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(PreparedMethod, "new_cache", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluated(limit=1)


def test_a_missing_checkpoint_is_found_before_the_first_answer(
    evaluated: Evaluated, tiny_llava_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="qwen2vl_7b is not on this machine"):
        evaluated(models=f"tiny={tiny_llava_folder},qwen2vl_7b", limit=1)
    assert not (tmp_path / "run").exists()
