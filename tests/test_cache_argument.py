"""Models are given a cache by the name that they take it by, which transformers changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import DynamicCache

from kvbench.cache import bind, cache_argument, calibrate_statistics
from kvbench.doctor import probe
from kvbench.efficiency.engine import EagerEngine
from kvbench.efficiency.peers import run_generate
from kvbench.efficiency.prompts import micro_batches
from kvbench.efficiency.request import TrialRequest
from kvbench.efficiency.workload import Workload
from kvbench.evaluation.decode import prefill
from kvbench.evaluation.lm_eval_model import KVBenchVLM
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.registry import METHODS

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values:FutureWarning")

WORKLOAD = Workload(24, 0, 7, 2)


class Older(torch.nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...


class Newer(torch.nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> None: ...


@pytest.fixture(scope="module")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_llava_folder}"))


def test_the_name_is_that_of_the_forward_call() -> None:
    cache = DynamicCache()
    assert cache_argument(Older(), cache) == {"past_key_values": cache}
    assert cache_argument(Newer(), cache) == {"cache": cache}


def test_a_model_fills_the_cache_that_it_is_given(tiny_text_model: Any) -> None:
    model, cache = tiny_text_model().model, DynamicCache()
    model(torch.arange(20, 40)[None], **cache_argument(model, cache))
    model.generate(
        torch.arange(20, 45)[None],
        **cache_argument(model, cache),
        max_new_tokens=3,
        min_new_tokens=3,
    )
    assert cache.get_seq_length() == 27


def test_answers_never_warn(loaded: LoadedModel) -> None:
    inputs = probe.prompts(loaded)
    prefill(loaded.model, inputs, DynamicCache(), split=True)
    probe.speak(loaded.model, inputs, DynamicCache())


def test_lm_eval_never_warns(loaded: LoadedModel) -> None:
    request = Instance("generate_until", {}, ("What?", {"max_gen_toks": 2}), 0, ("t", 0, 1))
    KVBenchVLM(loaded, "hf_dynamic").generate_until([request], disable_tqdm=True)


def test_calibration_never_warns(tiny_text_model: Any) -> None:
    prompts = [{"input_ids": torch.arange(20, 60)[None]}]
    calibrate_statistics(tiny_text_model().model, prompts, {})


def test_measurements_of_speed_never_warn(tiny_text_model: Any) -> None:
    model = tiny_text_model().model
    engine = EagerEngine(model, bind(model, "rtn_int4"), WORKLOAD, "asked for")
    for first_row, prompts in micro_batches(model, WORKLOAD, WORKLOAD.batch, seed=3):
        engine.prefill(first_row, prompts)
    engine.decode()
    for probes in (False, True):
        request = TrialRequest(
            "tiny", "hf_dynamic", WORKLOAD, "generate", device="cpu", probe=probes
        )
        assert run_generate(request, model, METHODS.get("hf_dynamic")).status == "ok"
