"""Room in a cache against bytes counted by hand."""

from __future__ import annotations

import pytest

from kvbench.cache.contract import LayerSpec
from kvbench.efficiency.workload import CacheLayout, Workload, cache_layout
from kvbench.errors import UserError
from kvbench.registry import METHODS, configured, parse_spec

# LLaVA-1.5-7B: 32 layers, 32 heads of 128 channels; the first two are text-salient.
SPECS = [LayerSpec(i, 32, 32, 32, 128, text_salient=i < 2) for i in range(32)]
NUMBERS = 2 * 32 * 32 * 128
"""Keys and values of one token."""
PROMPT, VISION, ANSWER = 600, 576, 512
TOTAL = PROMPT + ANSWER - 1


def layout_of(method: str, workload: Workload) -> CacheLayout:
    name, parameters = parse_spec(method)
    quantizer = configured(METHODS.get(name), parameters)
    return cache_layout([quantizer.layer(spec, None) for spec in SPECS], SPECS, workload)


def aligned(tokens: int) -> int:
    return (tokens + 15) // 16 * 16


def test_sixteen_bits_take_two_bytes_a_number() -> None:
    layout = layout_of("fp16", Workload(PROMPT, VISION, ANSWER))
    assert layout.row_nbytes == NUMBERS * 2 * TOTAL
    assert layout.read_nbytes(700) == NUMBERS * 2 * 700


@pytest.mark.parametrize(("method", "bits"), [("rtn_int2", 2.25), ("rtn_int4", 4.25)])
def test_round_to_nearest_takes_its_bits_and_metadata(method: str, bits: float) -> None:
    layout = layout_of(method, Workload(PROMPT, VISION, ANSWER))
    assert layout.row_nbytes == NUMBERS * bits / 8 * aligned(TOTAL)
    assert layout.read_nbytes(700) == NUMBERS * bits / 8 * 700


def test_akvq_vl_has_a_ring_pivots_and_two_precisions() -> None:
    layout = layout_of("akvq_vl", Workload(PROMPT, VISION, ANSWER))
    a_layer = NUMBERS // 32
    pivoted = (128 + 15) * 2 + aligned(TOTAL - 128 - 15) * 2.25 / 8
    text = PROMPT - VISION + ANSWER - 1 - 128
    salient = 128 * 2 + aligned(VISION) * 2.25 / 8 + aligned(text) * 4.25 / 8
    assert layout.row_nbytes == a_layer * (30 * pivoted + 2 * salient)


def test_kivi_has_a_block_of_keys_and_a_ring_of_values() -> None:
    layout = layout_of("kivi", Workload(PROMPT, VISION, ANSWER))
    side = NUMBERS // 2
    keys = 128 * 2 + 1024 * 2.25 / 8  # packed in whole blocks of 128
    values = 129 * 2 + aligned(TOTAL - 129) * 2.25 / 8
    assert layout.row_nbytes == side * (keys + values)


def test_what_is_read_grows_to_what_is_stored() -> None:
    workload = Workload(PROMPT, VISION, ANSWER)
    for method in ("fp16", "rtn_int2", "kivi", "akvq_vl"):
        layout = layout_of(method, workload)
        read = [layout.read_nbytes(tokens) for tokens in range(PROMPT + 1, TOTAL + 1)]
        assert read == sorted(read)
        assert 0.97 * layout.row_nbytes < read[-1] <= layout.row_nbytes


def test_short_workloads_never_leave_the_ring() -> None:
    layout = layout_of("akvq_vl", Workload(60, 0, 20))
    assert all(not any(side.packed.values()) for layer in layout.layers for side in layer.sides)


@pytest.mark.parametrize(
    "counts", [(0, 0, 1, 1), (10, 0, 0, 1), (10, 0, 1, 0), (10, 10, 1, 1), (10, -1, 1, 1)]
)
def test_bad_workloads_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match="token"):
        Workload(*counts)
