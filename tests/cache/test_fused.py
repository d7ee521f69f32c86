"""The fused kernel's view of a cache gives what decoding all of it gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kvbench.cache import layer as layer_module
from kvbench.cache.quantized import bind

METHODS = [
    "fp16",
    "rtn_int2",
    "rtn_int4",
    "kivi[group_size=8,residual=8]",
    "akvq_vl[recent=5,pivots=2]",
    "rtn_int2_wht_tsa[recent=0]",
    "skvq[group_size=16]",
]


def answers(model: Any, method: str, inputs: dict[str, torch.Tensor]) -> tuple[Any, int]:
    calibration = None
    if method.startswith("skvq"):
        pytest.importorskip("scipy")
        from kvbench.cache.calibration import calibrate_statistics

        calibration = calibrate_statistics(model, [{"input_ids": torch.arange(10, 60)[None]}], {})
    cache = bind(model, method, protocol="exact_prefill", calibration=calibration).new_cache()
    out = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, min_new_tokens=20)
    return out, cache.packed_tokens_read


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protocol", ["exact_prefill", "quantized_prefill"])
def test_fused_attention_gives_the_same_answers(
    method: str, protocol: str, tiny_text_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(tiny_text_model("llama").model).double()
    ids = torch.randint(10, 200, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    mask[2, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    plain = answers(model, method, inputs)
    monkeypatch.setattr(layer_module, "use_triton", lambda x: True)
    fused = answers(model, method, inputs)
    assert torch.equal(plain[0], fused[0])
    assert plain[1] == fused[1]
