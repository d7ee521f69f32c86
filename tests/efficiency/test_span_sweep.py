"""Launches that are tried; only a GPU can time them."""

from __future__ import annotations

import pytest
import torch

from kvbench.efficiency.span_sweep import SWEPT, Timed, sweep, table, tunings_of
from kvbench.errors import UserError
from kvbench.kernels.attention_launch import Tuning, cut, side_of, tuning_of
from kvbench.kernels.states import PackedStates, Span


def states(bits: int) -> PackedStates | torch.Tensor:
    if bits == 16:
        return torch.zeros(1, 1, 16, 128, dtype=torch.float16)
    meta = torch.zeros(1, 1, 16, 1, dtype=torch.float16)
    return PackedStates(torch.zeros(1, 1, 16, 16 * bits, dtype=torch.uint8), meta, meta, bits, 128)


@pytest.mark.parametrize("case", SWEPT, ids=lambda case: case.name)
def test_the_tuning_in_use_is_among_those_tried(case) -> None:
    spans = [Span(states(p.key_bits), states(p.value_bits), torch.ones(1)) for p in case.parts]
    used = tuple(tuning_of(span, case.heads // case.key_heads) for span in spans)
    tried = list(tunings_of(case))
    assert used in tried
    assert len(set(tried)) == len(tried)


def test_every_tuning_tried_has_a_shape() -> None:
    for case in SWEPT:
        for tunings in tunings_of(case):
            for part, tuning in zip(case.parts, tunings, strict=True):
                keys = side_of(states(part.key_bits), None)
                shape = cut(1, 128, keys, tuning, False, False)
                assert shape.tile % (8 * shape.streams) == 0


def test_the_table_shows_each_span() -> None:
    timed = Timed("a case", (Tuning(64, 1, 2), Tuning(16, 1, 3)), 0.25, 0.8, 3e-4)
    assert table([timed]).splitlines()[-1].split("  ")[0] == "(64, 1, 2); (16, 1, 3)"
    assert "80%" in table([timed])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_it_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="CUDA"):
        next(sweep())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UserError, match="no shape"):
        next(sweep("5-bit"))
