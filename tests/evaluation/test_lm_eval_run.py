"""`kvbench lm-eval` on tasks in a folder of our own, with tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from kvbench.errors import UserError
from kvbench.evaluation import choices, lm_eval_run, lm_eval_tasks
from kvbench.evaluation.lm_eval_model import KVBenchLM
from kvbench.evaluation.lm_eval_run import LmEvalRequest, run_lm_eval
from kvbench.evaluation.lm_eval_tasks import local_tasks
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.rows import LM_EVAL
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.report.lm_eval import lm_eval_text, write_lm_eval

GENERATES = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 8, min_new_tokens: 8, until: []}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOOSES = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["yes", "no"]
"""


@pytest.fixture(scope="module")
def loaded(tiny_text_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_text_folder}"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, loaded: LoadedModel) -> Path:
    """Tasks whose right answers are what the tiny model says with an exact cache."""
    root = tmp_path_factory.mktemp("tasks")
    questions = [f"{number} plus {number * 7} is what?" for number in range(4)]
    answers = KVBenchLM(loaded).generate_until(
        [
            Instance("generate_until", {}, (q, {"max_gen_toks": 8, "min_new_tokens": 8}), 0)
            for q in questions
        ],
        disable_tqdm=True,
    )
    lines = [
        json.dumps({"question": q, "answer": a}) for q, a in zip(questions, answers, strict=True)
    ]
    (root / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = (
        f"dataset_path: json\ntest_split: test\ndataset_kwargs:\n"
        f"  data_files: {{test: {root / 'sums.jsonl'}}}\n  cache_dir: {root / 'cache'}\n"
    )
    texts = {
        "sums": data + GENERATES,
        "yes_no": data + CHOOSES,
        "gone": "dataset_path: nobody/nothing_at_all\ntest_split: test\n" + GENERATES,
        "typo": data + GENERATES.replace("{{question}}", "{{question.a.b}}"),
        "shows": data + GENERATES + "doc_to_image: question\n",
    }
    for name, text in texts.items():
        (root / f"{name}.yaml").write_text(f"task: {name}\n{text}", encoding="utf-8")
    (root / "both.yaml").write_text("group: both\ntask: [sums, yes_no]\n", encoding="utf-8")
    return root


@pytest.fixture
def asked(folder: Path, tiny_text_folder: Path, tmp_path: Path) -> Callable[..., LmEvalRequest]:
    def make(names: str, methods: str = "fp16", **changes: Any) -> LmEvalRequest:
        fields: dict[str, Any] = {
            "tasks": tuple(names.split(",")),
            "methods": choices.choose_methods(methods),
            "model": choices.choose_models(f"tiny={tiny_text_folder}")[0],
            "protocol": "quantized_prefill",
            "out": tmp_path / "run",
            "include": folder,
            "device": "cpu",
        }
        return LmEvalRequest(**fields | changes)

    return make


@pytest.mark.usefixtures("one_bit")
def test_end_to_end(asked: Any) -> None:
    request = asked("sums", "fp16,one_bit,rtn_int4,kivi,hf_dynamic")
    run_lm_eval(request, Silent())
    found = json.loads((request.out / LM_EVAL).read_text(encoding="utf-8"))["methods"]
    assert [sample["metrics"]["exact_match"] for sample in found["fp16"]["samples"]["sums"]] == [
        1.0
    ] * 4
    for name, content in found.items():
        for sample in content["samples"]["sums"]:
            read = sample["packed_tokens_read"]
            assert {"one_bit": True, "rtn_int4": True, "hf_dynamic": None}.get(name, False) == (
                None if read is None else read > 0
            )
    assert found["one_bit"]["results"]["sums"]["exact_match,none"] < 1
    assert found["hf_dynamic"]["results"]["sums"]["exact_match,none"] == 1
    _check_report(request.out, found)


def _check_report(out: Path, found: dict[str, Any]) -> None:
    """The table says what lm-eval said, and refuses what never read the cache."""
    paths = write_lm_eval(out)
    assert [path.name for path in paths] == ["lm_eval.md", "lm_eval.csv"]
    header, *lines = (out / "lm_eval.csv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=False)) for line in lines]
    table = {row["method"]: row for row in rows}
    hits = [s["metrics"]["exact_match"] for s in found["one_bit"]["samples"]["sums"]]
    coarse = table["one_bit"]
    assert float(coarse["value"]) == np.mean(hits)
    assert float(coarse["difference"]) == np.mean(hits) - 1
    assert int(coarse["lost"]) == hits.count(0.0) and int(coarse["gained"]) == 0
    assert float(coarse["bits_per_element"]) == 1 + 32 / 16
    assert table["fp16"]["value"] == "1" and table["fp16"]["difference"] == ""
    unread = next(line for line in lines if ",kivi," in line)
    assert "cache not read: 4" in unread and ",4,,,,," in unread
    text = lm_eval_text(out)
    assert "exact_match" in text and "one_bit" in text


PICTURES = """
from datasets import Dataset
from PIL import Image

def documents(**_):
    return {"test": Dataset.from_list([{"shade": shade} for shade in (10, 120, 250)])}

def picture(doc):
    return [Image.new("RGB", (56, 56), (doc["shade"],) * 3)]

def score(doc, results):
    return {"length": float(len(results[0]))}
"""
SHADES = """
task: shades
custom_dataset: !function pictures.documents
test_split: test
output_type: generate_until
doc_to_text: "<image> Which shade is this?"
doc_to_image: !function pictures.picture
doc_to_target: "{{shade}}"
process_results: !function pictures.score
generation_kwargs: {max_gen_toks: 6, min_new_tokens: 6, until: []}
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""


def test_a_task_with_images(asked: Any, tiny_llava_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures.py").write_text(PICTURES, encoding="utf-8")
    (tmp_path / "shades.yaml").write_text(SHADES, encoding="utf-8")
    (entry,) = choices.choose_models(f"tiny={tiny_llava_folder}")
    request = asked("shades", "fp16,rtn_int2", model=entry, include=tmp_path, limit=2)
    run_lm_eval(request, Silent())
    found = json.loads((request.out / LM_EVAL).read_text(encoding="utf-8"))["methods"]
    exact, coarse = (found[name]["samples"]["shades"] for name in ("fp16", "rtn_int2"))
    assert len(exact) == len(coarse) == 2 and exact[0]["prompt"] == coarse[0]["prompt"]
    assert [s["answer"] for s in exact] != [s["answer"] for s in coarse]
    assert all(sample["packed_tokens_read"] > 0 for sample in coarse)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("yes_no", "yes_no asks for multiple_choice, not generate_until: log-likelihoods come"),
        ("both", "yes_no asks for multiple_choice"),
        ("sums,yes_no", "never reads a stored cache"),
        ("gone", r"data of the task gone are not on this machine.*--include"),
        ("typo", r"the task typo can.t be loaded \(UndefinedError: .*: correct its files"),
        ("shows", "the task shows shows images, which this model takes none of"),
    ],
)
def test_refused_before_a_model_is_loaded(
    asked: Any, monkeypatch: pytest.MonkeyPatch, tasks: str, message: str
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(lm_eval_run, "load", never)
    with pytest.raises(UserError, match=message):
        run_lm_eval(asked(tasks), Silent())


@pytest.mark.slow
def test_lm_evals_own_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = TaskManager()  # takes seconds
    monkeypatch.setattr(
        lm_eval_tasks,
        "TaskManager",
        lambda **asked: everything if asked.get("include_defaults", True) else TaskManager(**asked),
    )
    with pytest.raises(UserError, match="hellaswag asks for multiple_choice"):
        local_tasks(["hellaswag"], folder, images=False, limit=None)
    with pytest.raises(UserError, match="data of the task gsm8k are not on this machine"):
        local_tasks(["gsm8k"], None, images=False, limit=None)
    with pytest.raises(UserError, match=r"unknown lm-eval task 'gsm8kk': did you mean gsm8k"):
        local_tasks(["gsm8kk"], None, images=False, limit=None)


def test_calibrated_methods_are_calibrated_on_no_task(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval_run, "_CALIBRATION_WINDOW", 64)
    request = asked("sums", "fp16,smoothquant", limit=1)
    notes: list[str] = []
    progress = Silent()
    progress.note = notes.append  # type: ignore[method-assign]
    run_lm_eval(request, progress)
    assert "calibrating tiny for smoothquant on the end of pydoc" in notes[0]
    found = json.loads((request.out / LM_EVAL).read_text(encoding="utf-8"))["methods"]
    assert found["smoothquant"]["calibration"] and not found["fp16"]["calibration"]


def test_fp16_answers_as_the_stock_model(loaded: LoadedModel) -> None:
    from lm_eval.models.huggingface import HFLM

    generation = {"max_gen_toks": 12, "min_new_tokens": 12, "until": []}
    requests = [
        Instance("generate_until", {}, (text, generation), 0, ("t", number, 1))
        for number, text in enumerate(("What is this?", "And that, then?"))
    ]
    stock = HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    expected = stock.generate_until(requests, disable_tqdm=True)
    for protocol in ("quantized_prefill", "exact_prefill"):
        ours = KVBenchLM(loaded, protocol=protocol)
        assert ours.generate_until(requests, disable_tqdm=True) == expected
    coarse = KVBenchLM(loaded, "rtn_int2").generate_until(requests, disable_tqdm=True)
    assert coarse != expected


def test_a_prompt_is_not_cut(loaded: LoadedModel) -> None:
    request = Instance("generate_until", {}, ("x" * 4095, {"max_gen_toks": 8}), 0, ("t", 0, 1))
    with pytest.raises(UserError, match="has 4096 tokens, but tiny reads 4088: ask for fewer"):
        KVBenchLM(loaded).generate_until([request], disable_tqdm=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "--limit is 0"),
        ({"num_fewshot": -1}, "--num-fewshot is -1"),
        ({"include": Path("/nowhere")}, "task folder /nowhere is no folder"),
        ({"tasks": ()}, "no tasks to run"),
    ],
)
def test_bad_requests(asked: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        asked("sums", **changes)
