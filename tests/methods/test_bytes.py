"""Stored bytes, to the byte, against the formulas of each method's cost.

bits = 16 · exact tokens + (code bits + metadata bits / group) · the others, for keys and for
values, plus a byte on each side for every token in a window (the bits that it waits for) and, where
keys are stored before RoPE, four bytes a token for its place in the sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kvbench import quantized_cache
from kvbench.cache import Calibration, LayerSpec
from kvbench.registry import METHODS, configured

H, D, PROMPT, TOTAL = 2, 16, 37, 70
EXACT = 2 * D  # bytes of a bfloat16 vector
VISION = range(5, 25)
PIVOTS = (0, 9, 33)  # of the prompt; 33 is in the window at first
GROUP = 8  # as in the fixture `small`: windows of 8, residual 16, 2 sinks


def packed(bits: int) -> int:
    """Bytes of one vector's codes with four bytes of metadata for each group of 8."""
    return D * bits // 8 + D // GROUP * 4


def rtn(bits: int) -> Callable[[int, bool], int]:
    return lambda length, salient: 2 * H * length * packed(bits)


def kivi(length: int, salient: bool) -> int:
    """Keys: 8 tokens of a channel share metadata; exact are T mod 16 keys and 16 values."""
    old_keys, old_values = length - length % 16, max(length - 16, 0)
    keys = H * (old_keys * D * 2 // 8 + old_keys // GROUP * D * 4 + (length - old_keys) * EXACT)
    values = H * (old_values * packed(2) + (length - old_values) * EXACT)
    return keys + values + (length - old_keys) + (length - old_values)


def skvq(length: int, salient: bool) -> int:
    """Four groups of 8 over both heads; each token's place in the sequence for its RoPE."""
    exact = min(length, 2 + 8)
    vector = H * D * 2 // 8 + 4 * 4
    return 2 * (exact * H * EXACT + (length - exact) * vector) + 2 * min(length, 8) + 4 * length


def akvq(length: int, salient: bool) -> int:
    """8 recent tokens exact; others 4 bits (text) and 2 (vision), or 2 with three pivots exact."""
    old = range(length - 8)
    if salient:
        stored = sum(packed(2 if token in VISION else 4) for token in old)
    else:
        stored = sum(EXACT if token in PIVOTS else packed(2) for token in old)
    return 2 * (H * (stored + 8 * EXACT) + 8)


def without_pivots(length: int, salient: bool) -> int:
    if salient:
        return akvq(length, True)
    return 2 * (H * ((length - 8) * packed(2) + 8 * EXACT) + 8)


def vectors(key: int, value: int) -> Callable[[int, bool], int]:
    """So many bytes a key and a value of every token."""
    return lambda length, salient: H * length * (key + value)


def oscar(length: int, salient: bool) -> int:
    """2 sinks and 8 to 15 recent tokens exact: eight leave together."""
    recent = min(length, 8) + max(length - 8, 0) % 8
    packed_tokens = max(length - recent - 2, 0)
    return 2 * (H * ((length - packed_tokens) * EXACT + packed_tokens * packed(2)) + recent)


def rotatekv(length: int, salient: bool) -> int:
    """Three pivots exact at once, others packed; keys know their column."""
    return 2 * H * (3 * EXACT + (length - 3) * packed(2)) + 4 * length


def vidkv(key: int, value: int) -> Callable[[int, bool], int]:
    """So many bytes a block of 8 tokens; the order of the channels is int16."""

    def total(length: int, salient: bool) -> int:
        exact = (length - PROMPT // 8 * 8) % 16
        blocks = (length - exact) // 8
        return H * (blocks * (key + value) + 2 * exact * EXACT) + 2 * exact + 2 * D

    return total


def calibquant(length: int, salient: bool) -> int:
    """A bit for each number of vision tokens, two float16 numbers a channel for all of them."""
    vision = len(VISION)
    return 2 * H * (vision * D // 8 + 4 * D + (length - vision) * EXACT)


def mikv(length: int, salient: bool) -> int:
    """A fifth exact in each head, with 4 bytes of score; half a head shares metadata."""
    kept = length // 5
    vectors = kept * EXACT + (length - kept) * packed(2)
    return 2 * H * (vectors + kept) + 4 * H * kept + H * D * 2  # and a factor a key channel


def zip_cache(low: int, high: int, writes: int, new: int, merged: bool) -> int:
    """Keys: 4 bytes a channel for each tier of a write; values: 4 bytes a token and range."""
    keys = H * (low * D * 2 // 8 + high * D * 4 // 8 + writes * D * 4 + new * EXACT)
    ranges = (low + high) * (1 if merged else H) * 4
    values = H * (low * D * 2 // 8 + high * D * 4 // 8 + new * EXACT) + ranges + H * D * 2
    return keys + values + 2 * new * (1 if merged else H)


def zipcache(length: int, salient: bool) -> int:
    """0.4 of the prompt, and 3 of every 8 new tokens, at 2 bits."""
    blocks, new = divmod(length - PROMPT, 8)
    low, high = PROMPT * 4 // 10 + 3 * blocks, -(-PROMPT * 6 // 10) + 5 * blocks
    return zip_cache(low, high, 2 * (1 + blocks), new, merged=False)


def zipvl(length: int, salient: bool) -> int:
    """Here the whole of the attention is wanted, so all tokens are important."""
    blocks, new = divmod(length - PROMPT, 8)
    return zip_cache(0, length - new, 1 + blocks, new, merged=True)


def kvcrush(length: int, salient: bool) -> int:
    """Half of the prompt is gone."""
    return 2 * H * (length - PROMPT + PROMPT // 2) * EXACT


def kvtuner(length: int, salient: bool) -> int:
    """K8V4, a group a head: four bytes of metadata and D (keys) or D / 2 (values) of codes."""
    return H * length * (D + 4 + D // 2 + 4)


FORMULAS: dict[str, Callable[[int, bool], int]] = {
    "fp16": lambda length, salient: 2 * H * length * EXACT,
    "rtn_int4": rtn(4),
    "rtn_int2": rtn(2),
    "rtn_int2_wht": rtn(2),
    "smoothquant": rtn(2),
    "kivi": kivi,
    "kvtuner": kvtuner,
    "skvq": skvq,
    "akvq_vl": akvq,
    "rtn_int2_wht_tsa": without_pivots,
    "fp8": vectors(D + 4, D + 4),
    "nvfp4": vectors(D // 2 + 1, D // 2 + 1),
    "quarot_kv": rtn(4),
    "turboquant_k8v4": vectors(D, D // 2 + 4),
    "turboquant_4bit_nc": vectors(D // 2 + 2, D // 2 + 4),
    "turboquant_k3v4_nc": vectors(3 * D // 8 + 2, D // 2 + 4),
    "turboquant_3bit_nc": vectors(3 * D // 8 + 2, 3 * D // 8 + 4),
    "turboquant_paper": vectors(3 * D // 8 + 2, 3 * D // 8 + 2),
    "oscar": oscar,
    "rotatekv": rotatekv,
    # 8 channels of 2 bits and 8 coefficients of 1; 128 codes in 26 bytes.
    "vidkv": vidkv(8 * 2 + 8 * 4 + 8 + 8 * 2, 26 + 16 * 2),
    "vidkv_as_shipped": vidkv(8 * 2 + 8 * 4 + 16 + 16 * 2, 32 + 16 * 2),
    "calibquant": calibquant,
    "mikv": mikv,
    "zipcache": zipcache,
    "zipvl": zipvl,
    "kvcrush": kvcrush,
}


def test_every_built_in_method_has_a_formula(quantizer_name: str) -> None:
    if METHODS.origin(quantizer_name).startswith("kvbench.methods."):
        assert quantizer_name in FORMULAS


@pytest.mark.parametrize("salient", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_bytes_equal_the_formula_at_every_step(
    tiny_text_model, calibrated, small, driver, random_states, name: str, salient: bool
) -> None:
    model = tiny_text_model().model
    method = small(name)
    drive = driver(
        replace(method, tau=1.0) if name == "zipvl" else method,
        LayerSpec(1, 2, 4, H, D, text_salient=salient),
        "quantized_prefill",
        calibration=equal_clusters(calibrated(model)) if name == "skvq" else calibrated(model),
        rotary=LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4)),
    )
    states = [x.bfloat16() for x in random_states(TOTAL)]
    vision = torch.tensor([[token in VISION for token in range(TOTAL)]])
    residual = torch.zeros(1, PROMPT, 4)
    residual[0, list(PIVOTS), 2] = 100.0
    for start, end in zip([0, *range(PROMPT, TOTAL)], range(PROMPT, TOTAL + 1), strict=False):
        parts = [x[:, :, start:end] for x in states]
        drive.step(*parts, vision=vision[:, start:end], residual=None if start else residual)
        expected = FORMULAS[name](end, salient)
        assert drive.layer.nbytes == expected
        assert drive.layer.row_nbytes(0) == expected
        assert sum(drive.layer.elements) == 2 * H * D * end


def equal_clusters(calibration: Calibration) -> Calibration:
    """Statistics whose channels fall into four groups of eight for every k-means."""
    kinds = (torch.arange(32) % 4).float().view(1, 2, 16).expand(2, -1, -1) * 10 + 1
    ends = {f"{side}_min": -kinds for side in ("key", "value")}
    ends |= {f"{side}_max": kinds for side in ("key", "value")}
    return Calibration({**calibration.statistics, **ends})


def test_every_layer_of_a_table_has_its_own_bytes(driver, random_states) -> None:
    """K 2 and V 8, then K 8 and V 2; groups of 8, the newest `length mod 16` tokens exact."""
    method = configured(METHODS.get("kvtuner"), {"pairs": "K28V82", "scheme": "kivi"})
    method = dataclasses.replace(method, group_size=8, residual=16)  # type: ignore[type-var]
    for index, (key_bits, value_bits) in enumerate([(2, 8), (8, 2)]):
        drive = driver(method, LayerSpec(index, 2, 4, H, D), "quantized_prefill")
        states = [x.bfloat16() for x in random_states(TOTAL)]
        for start, end in zip([0, *range(PROMPT, TOTAL)], range(PROMPT, TOTAL + 1), strict=False):
            drive.step(*(x[:, :, start:end] for x in states))
            before = end if start == 0 else end - 1  # the window settles after a step
            old = before - before % 16 if end % 16 else end
            keys = H * (old * D * key_bits // 8 + old // GROUP * D * 4 + (end - old) * EXACT)
            values = H * (old * packed(value_bits) + (end - old) * EXACT)
            assert drive.layer.nbytes == keys + values + 2 * (end - old)


@pytest.mark.parametrize("name", ["fp16", "rtn_int4", "kivi", "skvq[reorder=false]"])
def test_the_cache_adds_its_layers_up(tiny_text_model, name: str) -> None:
    model = tiny_text_model(layers=3).model
    cache = quantized_cache(model, name)
    with torch.no_grad():
        model(torch.arange(20, 170)[None], past_key_values=cache)
    layers = sum(layer.nbytes for layer in cache.layers)
    positions = 150 * 4 if name.startswith("skvq") else 0  # int32, shared by all layers
    assert cache.nbytes() == layers + positions
    elements = 3 * 2 * 150 * H * D
    assert cache.bits_per_element() == pytest.approx(8 * (layers + positions) / elements)
    [row] = cache.rows()
    assert row.nbytes == cache.nbytes()
    assert row.elements == elements
    assert row.packed_tokens_read == cache.packed_tokens_read


def test_fp16_takes_sixteen_bits(tiny_text_model) -> None:
    tiny = tiny_text_model(seed=3)
    model = type(tiny.model)(tiny.model.config).to(torch.bfloat16).eval()
    cache = quantized_cache(model, "fp16")
    with torch.no_grad():
        model(torch.arange(20, 60)[None], past_key_values=cache)
    assert cache.bits_per_element() == 16.0
