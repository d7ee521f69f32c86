"""The checks on a model: what passes, and that broken caches don't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench.cache import Rotate
from kvbench.cache.storage import Segment
from kvbench.doctor import DoctorRequest, Finding, Status
from kvbench.doctor import checks as module
from kvbench.evaluation import choices
from kvbench.registry import METHODS

Examined = Callable[..., dict[str, Finding]]


@pytest.fixture
def examined(tiny_llava_folder: Path) -> Examined:
    """Findings of the checks on the tiny LLaVA, or another folder, by name."""

    def run(methods: str, folder: Path = tiny_llava_folder) -> dict[str, Finding]:
        (entry,) = choices.choose_models(f"tiny={folder}")
        request = DoctorRequest(choices.choose_methods(methods), entry, device="cpu")
        found = [f for f in module.model_checks(request, entry) if f.section == "checks on tiny"]
        return {finding.name: finding for finding in found}

    return run


def test_sound_methods_pass(examined: Examined) -> None:
    found = examined("fp16,kivi,smoothquant,rtn_int2_wht")
    assert {finding.status for finding in found.values()} == {Status.OK}
    assert set(found) == {"1-bit cache", "fp16", "kivi", "smoothquant", "rtn_int2_wht", "time"}
    assert found["fp16"].text.endswith("exact_prefill 6 of 6 tokens as plain generate")
    assert "nats at 4.00 bits" in found["rtn_int2_wht"].text


def test_a_text_model_passes(examined: Examined, tiny_text_folder: Path) -> None:
    found = examined("fp16,rtn_int4", tiny_text_folder)
    assert {finding.status for finding in found.values()} == {Status.OK}


def test_a_cache_that_is_never_read_is_found(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak = module.speak
    monkeypatch.setattr(
        module, "speak", lambda model, inputs, _: speak(model, inputs, DynamicCache())
    )
    found = examined("fp16,rtn_int2")
    assert found["1-bit cache"].status == Status.FAIL
    assert found["1-bit cache"].text == "was never read under quantized_prefill"
    assert found["rtn_int2"].text == "never read its quantized storage under quantized_prefill"
    assert found["fp16"].status == Status.OK


def test_storage_that_keeps_exact_states_is_found(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized in name only: reads are counted, but what is read is what came in."""
    append = Segment.append

    def remember(self: Any, states: Any, slots: Any) -> None:
        old = getattr(self, "exact", None)
        self.exact = states.data if old is None else torch.cat((old, states.data), 2)
        append(self, states, slots)

    def read(self: Any, dtype: torch.dtype) -> Any:
        return type(self.parts[0])(self.exact, self.lengths)

    monkeypatch.setattr(Segment, "append", remember)
    monkeypatch.setattr(Segment, "read", read)
    found = examined("rtn_int2[bits=8]")
    assert found["1-bit cache"].text == "left the answer as it is under quantized_prefill"


def test_a_transform_without_its_inverse_is_found(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rotate, "attend", lambda self, x: x)
    found = examined("rtn_int2,rtn_int2_wht")
    assert found["rtn_int2"].status == Status.OK
    assert found["rtn_int2_wht"].status == Status.FAIL
    assert "from plain generate with every token exact" in found["rtn_int2_wht"].text


def test_a_method_that_does_not_fit_is_noted(examined: Examined) -> None:
    found = examined("rtn_int2[group_size=5]")
    (finding,) = (f for name, f in found.items() if name.startswith("rtn_int2"))
    assert finding.status == Status.NOTE
    assert "group size" in finding.advice


def test_a_mistake_in_a_method_is_a_failure(
    examined: Examined, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(self: Any, spec: Any, calibration: Any) -> Any:
        return spec.nowhere

    monkeypatch.setattr(type(METHODS.get("rtn_int2")), "layer", layer)
    finding = examined("rtn_int2")["rtn_int2"]
    assert (finding.status, finding.text) == (Status.FAIL, "has a mistake")
    assert "layer() of RTN fails for layer 0 (AttributeError: " in finding.advice


def test_a_crash_is_a_finding(examined: Examined, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand more")

    monkeypatch.setattr(module, "speak", crash)
    finding = examined("fp16")["fp16"]
    assert (finding.status, finding.text) == (
        Status.FAIL,
        "OutOfMemoryError: CUDA out of memory",
    )
    assert finding.advice == "free memory or take --device cpu"


def test_a_model_that_is_not_here(tmp_path: Path) -> None:
    (entry,) = choices.choose_models("llava15_7b")
    request = DoctorRequest(choices.choose_methods("fp16"), entry)
    (finding,) = module.model_checks(request, entry)
    assert finding.status == Status.FAIL
    assert "hf download llava-hf/llava-1.5-7b-hf" in finding.advice
