"""What may be asked of an evaluation, and the sentence for what may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.choices import (
    choose_methods,
    choose_models,
    choose_protocols,
    choose_tasks,
)
from kvbench.evaluation.request import CalibrationRequest, EvalRequest

TWELVE = ("oe", "oi", "ma", "en", "sc", "st", "su", "wqa", "tqa", "mqa", "sqa", "dqa")


@pytest.fixture
def fields(tmp_path: Path) -> dict[str, Any]:
    return {
        "methods": choose_methods("fp16"),
        "models": choose_models("smol_llava"),
        "tasks": ("oe",),
        "protocols": ("quantized_prefill",),
        "out": tmp_path / "out",
    }


def test_all_tasks_are_milebenchs_twelve() -> None:
    assert choose_tasks("all") == TWELVE
    assert choose_tasks("dqa,easy_vqa,dqa") == ("dqa", "easy_vqa")
    assert choose_tasks("easy_vqa,all") == ("easy_vqa", *TWELVE)


def test_methods_are_configured_and_named_canonically() -> None:
    chosen = choose_methods("fp16,akvq_vl[clip=0.7,recent=64],akvq_vl[recent=64,clip=0.70]")
    assert [choice.spec for choice in chosen] == ["fp16", "akvq_vl[clip=0.7,recent=64]"]
    quantizer: Any = chosen[1].quantizer
    assert (quantizer.recent, quantizer.clip) == (64, 0.7)


def test_a_default_written_out_is_the_default() -> None:
    assert [choice.spec for choice in choose_methods("akvq_vl[recent=128],akvq_vl")] == ["akvq_vl"]


def test_all_methods_cover_the_papers_table() -> None:
    paper = {"fp16", "rtn_int4", "rtn_int2", "smoothquant", "kivi", "skvq", "akvq_vl"}
    assert paper <= {choice.spec for choice in choose_methods("all")}


def test_a_folder_takes_the_place_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    local, bundled = choose_models(f"llava15_7b={tmp_path},smol_llava")
    assert (local.name, local.folder) == ("llava15_7b", tmp_path)
    assert (bundled.name, bundled.folder) == ("smol_llava", None)


def test_protocols() -> None:
    assert choose_protocols("both") == ("quantized_prefill", "exact_prefill")
    assert choose_protocols("exact_prefill") == ("exact_prefill",)
    assert choose_protocols("exact_prefill,quantized_prefill") == choose_protocols("both")


@pytest.mark.parametrize(
    ("choose", "text", "part"),
    [
        (choose_tasks, "ooe", "unknown task 'ooe': did you mean"),
        (choose_tasks, "oe,,oi", "empty name"),
        (choose_methods, "kivy", "unknown method 'kivy': did you mean kivi?"),
        (choose_methods, "kivi[bitz=2]", "did you mean bits?"),
        (choose_methods, "kivi[bits=two]", "'bits' of KIVI must be a whole number, not 'two'"),
        (choose_methods, "kivi[bits=2", "is missing"),
        (choose_methods, "kivi[residual=100]", "multiple of its group size"),
        (choose_models, "llava15", "unknown model 'llava15': did you mean llava15_7b"),
        (choose_models, "llava15_7b=/no/such", "/no/such"),
        (choose_models, "llava15_7b=", "llava15_7b="),
        (choose_protocols, "exact", "unknown protocol 'exact': did you mean exact_prefill?"),
    ],
)
def test_bad_choices(choose: Any, text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        choose(text)
    assert part in str(caught.value)


def test_one_model_from_two_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="'llava15_7b' is given in two ways"):
        choose_models(f"llava15_7b,llava15_7b={tmp_path}")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("methods", (), "no methods to evaluate"),
        ("limit", 0, "--limit is 0: give at least 1"),
        ("seed", -1, "--seed is -1"),
        ("batch", 0, "--batch is 0"),
        ("calibration_samples", 0, "--calibration-samples is 0"),
        ("dtype", "float61", "unknown dtype 'float61': did you mean float16"),
        ("device", "gpu", "unknown device 'gpu'"),
        ("data_root", Path("/no/such"), "data root /no/such does not exist"),
        ("data_root", Path(__file__), "is not a folder"),
        ("calibration", Path("/no/such"), "calibration folder /no/such does not exist"),
        ("out", Path(__file__), "is a file"),
    ],
)
def test_bad_requests(fields: dict[str, Any], name: str, value: Any, part: str) -> None:
    EvalRequest(**fields)
    with pytest.raises(UserError) as caught:
        EvalRequest(**fields | {name: value})
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("samples", 0), ("seed", -1), ("dtype", "x"), ("device", "x")]
)
def test_bad_calibration_requests(fields: dict[str, Any], name: str, value: Any) -> None:
    common = {key: fields[key] for key in ("methods", "models", "out")}
    CalibrationRequest(**common)
    with pytest.raises(UserError):
        CalibrationRequest(**common, **{name: value})
