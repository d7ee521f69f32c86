"""What a profile says; only a GPU can be profiled."""

from __future__ import annotations

import pytest
import torch

from kvbench.efficiency.power import Power
from kvbench.efficiency.request import TrialRequest
from kvbench.efficiency.step_profile import (
    KernelTime,
    Launch,
    Profile,
    conditions,
    profile_step,
    short_name,
    step_requests,
    summed,
    table,
)
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError

TINY_LAYERS = 3


def test_launches_are_summed_by_name_and_pass() -> None:
    launches = [
        Launch("void a<1>(int)", 0, 2.0),
        Launch("b", 2, 5.0),
        Launch("void a<2>()", 7, 4.0),
    ]
    assert summed(launches, 2) == [KernelTime("a", 1.0, 3.0), KernelTime("b", 0.5, 2.5)]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::reduce_kernel<512, 1>(at::native::Op<float>)", "reduce_kernel"),
        ("void at::native::(anonymous namespace)::Copy<at::Op<4u>, int>(char*)", "Copy"),
        ("nvjet_sm90_hsh_192x88_64x6_4x1_v_bz_TNT", "nvjet_sm90_hsh_192x88_64x6_4x1_v_bz_TNT"),
        ("attend", "attend"),
    ],
)
def test_names_are_bare(name: str, short: str) -> None:
    assert short_name(name) == short


def test_the_table_shows_the_longest_and_the_rest() -> None:
    kernels = tuple(KernelTime(f"k{i}", 2, float(4 - i)) for i in range(4))
    lines = table([Profile("a step", 11.0, kernels)], most=2).splitlines()
    assert lines[0] == "a step: 11.00 ms, kernels 10.00 ms"
    powered = Profile("a step", 11.0, kernels, Power(691.6, 700.0, 1515, 1980))
    assert table([powered]).splitlines()[0] == (
        "a step: 11.00 ms, kernels 10.00 ms; the others 692 of 700 W, 1,515 of 1,980 MHz"
    )
    assert [line.split() for line in lines[-3:]] == [
        ["k0", "2", "4.000", "40%"],
        ["k1", "2", "3.000", "30%"],
        ["the", "rest", "3.000", "30%"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_it_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="CUDA"):
        list(step_requests("llava15_7b", "fp16", 1, 600, 8, "auto"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_attention_is_among_the_kernels_of_a_step(tiny_llava_folder) -> None:
    model = f"tiny={tiny_llava_folder}"
    request = TrialRequest(
        model,
        "akvq_vl[recent=16,text_layers=none]",
        Workload(44, 32, 24, 3),
        "engine",
        prefill_rows=2,
    )
    prompts, step = profile_step(request, steps=2)
    names = {kernel.name: kernel.launches for kernel in step.kernels}
    assert names["attend"] == TINY_LAYERS
    assert prompts.ms > 0 and step.ms > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_conditions_name_the_device_and_versions() -> None:
    device, versions = conditions().splitlines()
    assert device.startswith(f"{torch.cuda.get_device_name()}: copy ")
    assert f"torch {torch.__version__.split('+')[0]}" in versions
