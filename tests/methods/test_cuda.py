"""On a GPU every method stores and answers what it does on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def on_gpu() -> Any:
    """A float64 model moved to the GPU, a copy; angles of rotary embedding are the CPU's.

    They are float32, and their last bit now and then moves a number to the next code.
    """

    def make(model: Any) -> Any:
        moved = type(model)(copy.deepcopy(model.config)).double().eval()
        moved.load_state_dict(model.state_dict())
        for module in moved.cuda().modules():
            if type(module).__name__.endswith("RotaryEmbedding"):
                module.forward = angles_of(copy.deepcopy(module).cpu())
        return moved

    return make


def angles_of(module: Any) -> Any:
    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(angles.to(x.device) for angles in module(x.cpu(), position_ids.cpu()))

    return forward


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_answers_equal_those_of_the_cpu(
    tiny_llava, double, small, caches, calibrated, on_gpu, llava_inputs, quantizer_name, protocol
) -> None:
    inputs, model = llava_inputs(tiny_llava), double(tiny_llava.model)
    options = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    method = small(quantizer_name)
    cache = caches(model, method, protocol)
    expected = model.generate(**inputs, past_key_values=cache, **options)
    moved = on_gpu(model)
    twin = caches(moved, method, protocol, calibration=calibrated(model))
    mine = moved.generate(
        **{name: value.cuda() for name, value in inputs.items()}, past_key_values=twin, **options
    )
    assert twin.nbytes() == cache.nbytes()
    assert twin.packed_tokens_read == cache.packed_tokens_read
    # Scales are worked out in float32 there: a few round to the next float16, a few numbers to the
    # next code. Outputs of attention rounded to float16 are off by more than that in every method.
    apart = torch.stack(mine.logits).cpu() - torch.stack(expected.logits)
    assert apart.square().mean().sqrt() < 5e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs(tiny_llava, small, caches, llava_inputs, lossy_name, dtype) -> None:
    model = type(tiny_llava.model)(copy.deepcopy(tiny_llava.model.config)).eval()
    model.load_state_dict(tiny_llava.model.state_dict())
    model = model.to("cuda", dtype)
    inputs = {name: value.cuda() for name, value in llava_inputs(tiny_llava).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    cache = caches(model, small(lossy_name))
    out = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=8, num_beams=2, do_sample=False
    )
    assert out.is_cuda
    assert cache.packed_tokens_read > 0
