"""Runs on a tiny LLaMA: which rows come, which are refused, and how a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvbench.errors import Mistake, UserError
from kvbench.evaluation.hardware import load
from kvbench.perplexity import score
from kvbench.perplexity.rows import ROWS, PerplexityRow, read_perplexity
from kvbench.perplexity.run import measure

Measured = Callable[..., list[PerplexityRow]]
BOTH = ("quantized_prefill", "exact_prefill")


def test_a_row_for_each_method_and_window(measured: Measured, listener: Any) -> None:
    rows = measured("rtn_int2", listener, protocols=BOTH)
    assert len(rows) == listener.total == listener.advanced == 3 * 2 * 2
    assert {row.status for row in rows} == {"ok"} and len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.nll is not None and row.kl is not None and row.packed_tokens_read is not None
        positions, reads = (
            (64, 64) if row.protocol == BOTH[0] else (64 - 48 + 1, sum(range(48, 65)))
        )
        assert len(row.nll) == len(row.kl) == positions
        assert (row.window, row.context) == (64, 64 if row.protocol == BOTH[0] else 48)
        exact = row.method == "fp16"
        assert row.packed_tokens_read == (0 if exact else 2 * reads)  # two layers
        assert row.bits_per_element == (32 if exact else 2 + 32 / 16)
        assert row.cache_bytes == row.bits_per_element * 64 * 2 * 2 * 2 * 16 / 8


def test_the_16_bit_cache_scores_as_the_plain_model(measured: Measured, asked: Any) -> None:
    rows = [row for row in measured() if row.method == "fp16"]
    request = asked()
    loaded = load(request.model, "cpu", "auto")
    stream = loaded.tokens.encode(Path(request.text).read_text(encoding="utf-8"))
    for row in rows:
        ids = torch.tensor([[1, *stream[row.number * 63 : (row.number + 1) * 63 + 1]]])
        with torch.no_grad():
            plain = loaded.model(ids[:, :-1]).logits[0].log_softmax(-1)
        expected = -plain.gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(row.nll, expected, rtol=1e-4, atol=1e-4)
        assert row.kl is not None and max(row.kl) == 0


@pytest.mark.usefixtures("one_bit")
@pytest.mark.parametrize("protocol", BOTH)
def test_a_destructive_method_changes_perplexity(measured: Measured, protocol: str) -> None:
    rows = measured("one_bit", protocols=(protocol,))
    exact, coarse = (
        np.exp(np.mean([row.nll for row in rows if row.method == name]))
        for name in ("fp16", "one_bit")
    )
    assert abs(coarse / exact - 1) > 1e-3
    assert min(np.mean(row.kl) for row in rows if row.method == "one_bit") > 0.1


def test_a_run_goes_on_where_it_was(
    measured: Measured, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured("rtn_int2,rtn_int4", protocols=BOTH)
    path = asked().out / ROWS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:7]) + lines[7][:50])
    passes = []
    forced = score.forced_logits

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(args)
        return forced(*args, **options)

    monkeypatch.setattr(score, "forced_logits", counted)
    with pytest.warns(UserWarning, match="torn last line"):
        again = measured("rtn_int2,rtn_int4", protocols=BOTH)
    assert len(passes) < 16  # two batches, two protocols, a reference and three methods each
    without_time = [{**vars(row), "seconds": 0.0} for row in again]
    key = lambda row: row["key"]  # noqa: E731
    assert sorted(without_time, key=key) == sorted(
        ({**vars(row), "seconds": 0.0} for row in whole), key=key
    )
    passes.clear()
    measured("rtn_int2,rtn_int4", protocols=BOTH)
    assert not passes


def test_one_that_reads_nothing_stored_is_refused(measured: Measured, listener: Any) -> None:
    rows = [row for row in measured("skvq,rtn_int4", listener) if row.method == "skvq"]
    assert len(rows) == 3  # its window keeps 128 tokens exact, and there are 64
    for row in rows:
        assert row.status == "error" and row.nll is row.kl is None
        assert row.error is not None and "no quantized token was read" in row.error
    assert sum("larger --window" in note for note in listener.notes) == 3


def test_a_methods_fault_is_a_status_and_told_when_all_is_done(
    measured: Measured, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced, calls = score.forced_logits, []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise ValueError("a bug")
        return forced(*args, **options)

    monkeypatch.setattr(score, "forced_logits", fails)
    with pytest.raises(Mistake, match=r"^rtn_int2 failed once \(ValueError: a bug, .*test_run.py:"):
        measured()
    rows = read_perplexity(asked("rtn_int2").out)
    assert [row.status for row in rows if row.method == "rtn_int2"] == ["error", "error", "ok"]
    assert {row.status for row in measured()} == {"ok"}


def test_memory_that_runs_out_is_a_status(
    measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced, calls = score.forced_logits, []

    def fails(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:  # after the reference and its control comes the method
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forced(*args, **options)

    monkeypatch.setattr(score, "forced_logits", fails)
    rows = measured()
    assert [row.status for row in rows if row.method == "rtn_int2"] == ["oom", "oom", "ok"]
    assert {row.status for row in rows if row.method == "fp16"} == {"ok"}
    monkeypatch.setattr(score, "forced_logits", forced)
    assert {row.status for row in measured()} == {"ok"}


@pytest.mark.parametrize("method", ["smoothquant", "skvq[window=8]"])
def test_calibration_is_on_other_text(measured: Measured, listener: Any, method: str) -> None:
    rows = [row for row in measured(method, listener) if row.method != "fp16"]
    assert len(rows) == 3 and len({row.calibration for row in rows} - {""}) == 1
    assert any("last 3 windows of words.txt, which are not scored" in n for n in listener.notes)
    listener.notes.clear()
    measured(method, listener, limit=4)
    assert not listener.notes  # kept beside the rows


def test_peers_run_where_they_can(measured: Measured, listener: Any) -> None:
    rows = [row for row in measured("hf_dynamic", listener, protocols=BOTH) if "hf" in row.method]
    assert {row.status for row in rows} == {"ok"} and {row.storage for row in rows} == {"foreign"}
    for row in rows:
        assert row.kl is not None and max(row.kl) < 1e-4 and row.packed_tokens_read is None
        assert row.bits_per_element == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 3}, "--window is 3"),
        ({"limit": 0}, "--limit is 0"),
        ({"batch": 0}, "--batch is 0"),
        ({"context": 64, "protocols": BOTH}, "--context 64 leaves nothing of a window of 64"),
        ({"device": "tpu"}, "unknown device"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"protocols": ()}, "at least one method and one protocol"),
    ],
)
def test_bad_requests(asked: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "/nowhere.txt"}, "can't read the text /nowhere.txt"),
        ({"window": 5000}, "more than the 4096 tokens that tiny reads"),
        ({"window": 1024}, "has 1600 tokens, but two windows of 1024 are needed"),
    ],
)
def test_texts_that_do_not_do(asked: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(asked(**changes), None)  # type: ignore[arg-type]


def test_something_to_compare_with(asked: Any, listener: Any) -> None:
    request = asked()
    object.__setattr__(request, "methods", request.methods[1:])
    with pytest.raises(UserError, match="add fp16"):
        measure(request, listener)
