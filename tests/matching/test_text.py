"""Settings for a text: the bits that were promised are those of the run's own caches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from kvbench.cache import bind
from kvbench.errors import UserError
from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.matching.evaluations import evenly
from kvbench.matching.measure import stored_bits
from kvbench.matching.text import OnText
from kvbench.perplexity.request import PerplexityRequest
from kvbench.perplexity.rows import read_perplexity

# Small windows, so that something of 64 tokens is quantized. How many tokens stay exact doesn't
# depend on states here: those of later layers are others under quantized_prefill.
SPECS = (
    "rtn_int2",
    "kivi[group_size=16,residual=16]",
    "skvq[sinks=2,window=8]",
    "akvq_vl[pivots=3,recent=8]",
    "rotatekv[pivots=1]",
    "oscar[recent=8,sinks=2]",
    "mikv",
    "zipcache",
    "vidkv[group_size=16,residual=16]",
    "kvcrush[keep=0.5,recent=8,start=2]",
    "kvcrush[base=rtn_int4,keep=0.5,recent=8,start=2]",
    "fp8",
)


@pytest.fixture
def asked(tiny_text_folder: Path, tmp_path: Path) -> Callable[..., PerplexityRequest]:
    """A request on a drawn text of 1,600 tokens."""
    path = tmp_path / "words.txt"
    words = ["the", "cache", "of", "a", "model", "keeps", "keys", "and", "values"]
    drawn = random.Random(0).choices(words, k=400)
    path.write_text(" ".join(drawn)[:1600], encoding="utf-8")

    def make(methods: str, **changes: Any) -> PerplexityRequest:
        fields: dict[str, Any] = {
            "methods": choices.choose_methods(methods),
            "model": choices.choose_models(f"tiny={tiny_text_folder}")[0],
            "protocols": ("quantized_prefill",),
            "out": tmp_path / "run",
            "text": str(path),
            "limit": 2,
            "window": 64,
            "context": 40,
            "batch": 2,
            "device": "cpu",
        }
        return PerplexityRequest(**fields | changes)

    return make


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_measured_bits_are_the_rows_bits(asked: Any, protocol: str) -> None:
    request = asked(f"fp16,{','.join(SPECS)}", protocols=(protocol,))
    evaluation = OnText(request, 2)
    ground = evaluation.ground(request.model, Silent())
    loaded = ground.loaded
    bound = [
        bind(
            loaded.model,
            choice.quantizer,  # type: ignore[arg-type]
            calibration=ground.statistics,
            text_salient_layers=loaded.entry.tsa_layers,
        )
        for choice in request.methods
    ]
    promised = stored_bits(loaded.model, ground.prompts, bound)
    evaluation.run(request.model, request.methods, Silent())
    rows = read_perplexity(request.out)
    for choice, bits in zip(request.methods, promised, strict=True):
        found = [row for row in rows if row.method == choice.spec]
        assert [row.status for row in found] == ["ok"] * 2, (choice.spec, found)
        mean = fmean(row.bits_per_element or 0 for row in found)
        assert bits == pytest.approx(mean, rel=1e-6), choice.spec


def test_what_follows_the_context_is_measured_as_generated(asked: Any) -> None:
    """KVCrush never evicts generated tokens: of 40 + 24, half of 40 and all of 24 stay."""
    bits = {}
    for protocol in ("quantized_prefill", "exact_prefill"):
        request = asked("kvcrush[keep=0.5,recent=8,start=2]", protocols=(protocol,))
        ground = OnText(request, 1).ground(request.model, Silent())
        method: Any = request.methods[0].quantizer
        (bits[protocol],) = stored_bits(
            ground.loaded.model, ground.prompts, [bind(ground.loaded.model, method)]
        )
    assert bits["quantized_prefill"] == pytest.approx(32 * 32 / 64)  # the model is float32
    assert bits["exact_prefill"] == pytest.approx(32 * (20 + 24) / 64)


def test_windows_are_measured_at_equal_distances(asked: Any) -> None:
    request = asked("rtn_int2", limit=None)
    ground = OnText(request, 3).ground(request.model, Silent())
    assert len(ground.prompts) == 3
    assert {prompt.inputs.input_ids.shape for prompt in ground.prompts} == {(1, 64)}
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(2, 5) == [0, 1]


def test_one_protocol_at_a_time(asked: Any) -> None:
    with pytest.raises(UserError, match="settings for one protocol"):
        OnText(asked("rtn_int2", protocols=("quantized_prefill", "exact_prefill")))
    with pytest.raises(UserError, match="--samples"):
        OnText(asked("rtn_int2"), 0)
