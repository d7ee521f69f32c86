from __future__ import annotations

import math

import pytest
import torch

from kvbench.efficiency import bench
from kvbench.errors import UserError
from kvbench.kernels.states import PackedStates, Span


def packed(room: int) -> PackedStates:
    codes = torch.randint(0, 256, (3, 2, room, 32), dtype=torch.uint8)
    return PackedStates(codes, torch.rand(3, 2, room, 1).half(), None, 2, 128)


def span(tokens: int, room: int) -> Span:
    lengths = torch.full((3,), tokens, dtype=torch.int32)
    return Span(packed(room), torch.randn(3, 2, room, 128).half(), lengths)


def test_bytes_are_those_of_the_tokens_that_are_there() -> None:
    # Keys: 32 bytes of codes and a float16 scale; values: 128 float16 numbers.
    assert bench.nbytes([span(10, 40), span(7, 7)]) == 3 * 2 * 17 * (32 + 2 + 256)


def test_the_first_rows_are_compared_with_the_reference() -> None:
    spans = [span(10, 40)]
    query = torch.randn(3, 4, 128).half()
    out = bench.reference(query, spans, 128**-0.5)
    assert bench.error_of(query, spans, out) < 1e-3
    out[1] *= 1.1
    assert bench.error_of(query, spans, out) > 1e-2
    assert math.isnan(bench.error_of(query, spans, torch.full_like(out, math.nan)))


def test_every_case_attends_to_the_tokens_of_its_shape() -> None:
    for group, members in bench.cases():
        assert {case.tokens for case in members} == {int(group.split()[-1])}


def test_the_table_shows_every_row() -> None:
    row = bench._row("B 64", "2-bit", 0.12, 302_000_000, 3e12, 0.71, 4.2e-4)
    bare = bench._row("B 64", "pack", 0.12, 302_000_000, 3e12, math.nan, None)
    result = {"device": "a GPU", "copy_bandwidth": 3e12, "matmul_rate": 6e14, "rows": [row, bare]}
    text = bench.table(result)
    assert "3.00 TB/s" in text and "600 TFLOP/s" in text
    assert text.splitlines()[-2].split()[2:] == ["2-bit", "0.120", "302", "84%", "5.92", "4.2e-04"]
    assert text.splitlines()[-1].split() == ["B", "64", "pack", "0.120", "302", "84%"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_it_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="CUDA"):
        bench.run()
