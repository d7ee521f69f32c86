"""lm-eval's model `kvbench-vlm` on the tiny LLaVA and the group milebench."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image

from kvbench.errors import Mistake, UserError
from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.decode import Generation, answer
from kvbench.evaluation.lm_eval_model import KVBenchVLM
from kvbench.evaluation.runner import PreparedMethod
from kvbench.evaluation.samples import ask, encoded, read_cell
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model
from kvbench.registry import TASKS
from kvbench.tasks.milebench.lm_eval import INCLUDE_PATH

TWO_TASKS = ("milebench_oe", "milebench_sc")
QUESTION = "Which colour does {image#1} show, and which {image#2}?"


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All twelve tasks, two samples each with two images of noise."""
    root, noise = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    tasks = [TASKS.get(name) for name in TASKS.names()]
    for folder in [task.folder for task in tasks if task.suite == "milebench"]:
        images = root / folder / "images"
        images.mkdir(parents=True)
        data = []
        for sample in range(2):
            names = [f"{sample}_{k}.png" for k in range(2)]
            for name in names:
                pixels = noise.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / name)
            data.append(
                {
                    "sample_id": sample,
                    "task_instruction_id": 0,
                    "image_quantity_level": "Few",
                    "task_instance": {
                        "context": f"{sample}: {QUESTION}",
                        "images_path": names,
                        "choice_list": ["red", "green"],
                    },
                    "response": "green",
                }
            )
        meta = {"question_type": "multi-choice", "task_instruction": ["Look."], "num_sample": 2}
        text = json.dumps({"meta_data": meta, "data": data})
        (root / folder / f"{folder}.json").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def loaded(tiny_llava_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_llava_folder}"))


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def run(data_root: Path) -> Evaluate:
    """lm-eval over some tasks; returns its results."""

    def evaluate(
        model: Any, metadata: dict[str, Any] | None = None, tasks: Any = TWO_TASKS, **options: Any
    ) -> Any:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(
            include_path=str(INCLUDE_PATH),
            include_defaults=False,
            metadata={"data_root": str(data_root)} | (metadata or {}),
        )
        return simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            **{"gen_kwargs": "max_gen_toks=12,min_new_tokens=12", "bootstrap_iters": 0} | options,
        )

    return evaluate


def answers(results: dict[str, Any]) -> dict[tuple[str, int], str]:
    """Answers by task and document."""
    return {
        (task, sample["doc_id"]): sample["resps"][0][0]
        for task, samples in results["samples"].items()
        for sample in samples
    }


@pytest.mark.slow
def test_fp16_answers_as_the_stock_model(
    run: Evaluate, tiny_llava_folder: Path, loaded: LoadedModel
) -> None:
    arguments = {"pretrained": str(tiny_llava_folder), "dtype": "float32", "device": "cpu"}
    group = {"tasks": ["milebench"], "limit": 1}
    stock = answers(run("hf-multimodal", model_args=arguments, batch_size=1, **group))
    assert len(stock) == len(set(stock.values())) == 12
    for protocol in ("quantized_prefill", "exact_prefill"):
        assert answers(run(KVBenchVLM(loaded, protocol=protocol), **group)) == stock


@pytest.mark.slow
@pytest.mark.usefixtures("one_bit")
@pytest.mark.parametrize("style", ["chat", "official"])
def test_a_destructive_method_changes_answers(
    run: Evaluate, loaded: LoadedModel, style: Any
) -> None:
    exact, coarse = (
        answers(run(KVBenchVLM(loaded, method, prompt_style=style)))
        for method in ("fp16", "one_bit")
    )
    assert all(exact[key] != coarse[key] for key in exact)


def test_by_name_from_arguments(run: Evaluate, tiny_llava_folder: Path) -> None:
    arguments = f"pretrained={tiny_llava_folder},kv_method=rtn_int4[clip=0.9],prompt_style=official"
    results = run("kvbench-vlm", model_args=arguments, batch_size=1, device="cpu")
    said = results["config"]["kvbench"]
    assert said["method"] == "rtn_int4[clip=0.9]"
    assert said["protocol"] == "quantized_prefill"
    assert said["prompt_style"].startswith("llava_llama_2@")
    assert said["out_of_memory"] == []
    assert said["model"] == tiny_llava_folder.name
    assert len(answers(results)) == 4


@pytest.mark.parametrize("spec", ["rtn_int2", "hf_quanto_int2[group_size=16]"])
def test_the_official_style_answers_as_eval_does(
    run: Evaluate, loaded: LoadedModel, data_root: Path, spec: str
) -> None:
    if spec.startswith("hf_quanto"):
        pytest.importorskip("optimum.quanto", reason="the extra [peers] is not installed")
    (choice,) = choose_methods(spec)
    method = PreparedMethod.of(loaded, choice, "exact_prefill", None)
    model = KVBenchVLM(loaded, spec, "exact_prefill", prompt_style="official")
    found = answers(run(model, {"image_paths": True}))
    for name in ("oe", "sc"):
        cell = read_cell(name, data_root, None, 0)
        for index, sample in enumerate(cell.samples):
            inputs = encoded(loaded, [ask(loaded, cell.task, sample)])
            cache = method.new_cache(loaded.model)
            generation = Generation(12, 12)
            (row,) = answer(loaded.model, inputs, cache, generation, peer=method.peer).rows
            expected = loaded.tokenizer.decode(row.ids, skip_special_tokens=True)
            assert found[f"milebench_{name}", index] == expected


def test_images_as_paths_are_opened_when_asked_for(run: Evaluate, loaded: LoadedModel) -> None:
    model = KVBenchVLM(loaded, "rtn_int2")
    assert answers(run(model, {"image_paths": True})) == answers(run(model))


def test_text_alone_is_answered_from_the_cache(loaded: LoadedModel) -> None:
    generation = {"max_gen_toks": 12, "min_new_tokens": 12, "until": []}
    request = Instance("generate_until", {}, ("What is this?", generation), 0, ("t", 0, 1))
    exact, coarse = (
        KVBenchVLM(loaded, method).generate_until([request], disable_tqdm=True)
        for method in ("fp16", "rtn_int2")
    )
    assert exact != coarse


def test_one_request_without_memory_does_not_end_the_run(
    run: Evaluate, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = KVBenchVLM(loaded), []
    expected = answers(run(model))
    generate = loaded.model.generate

    def fails_once(**arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**arguments)

    monkeypatch.setattr(loaded.model, "generate", fails_once)
    results = run(model)
    found = answers(results)
    assert len(calls) == 4
    assert [key for key in found if found[key] != expected[key]] == [("milebench_oe", 1)]
    assert found["milebench_oe", 1] == ""
    assert results["config"]["kvbench"]["out_of_memory"] == ["milebench_oe/1"]


@pytest.mark.parametrize(("method", "raised"), [("rtn_int2", Mistake), ("fp16", ValueError)])
def test_a_methods_fault_is_a_sentence_and_the_programs_is_not(
    run: Evaluate,
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    raised: type[Exception],
) -> None:
    def fails(**arguments: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(loaded.model, "generate", fails)
    with pytest.raises(raised) as told:
        run(KVBenchVLM(loaded, kv_method=method))
    if raised is Mistake:
        expected = "rtn_int2 failed at milebench_oe/0 (ValueError: a bug, "
        assert str(told.value).startswith(expected) and "test_lm_eval.py:" in str(told.value)


def test_a_broken_image_ends_the_run(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    visual = {"visual": [str(tmp_path / "a.png")]}
    request = Instance("generate_until", {}, ("<image> What?", {}, visual), 0, ("t", 0, 1))
    with pytest.raises(UserError, match=r"a\.png: not an image"):
        KVBenchVLM(loaded).generate_until([request], disable_tqdm=True)


def test_response_cache_is_refused(run: Evaluate, loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--use_cache: lm-eval's response cache doesn't tell"):
        run(KVBenchVLM(loaded), use_cache=str(tmp_path / "responses"))


def test_log_likelihoods_are_refused(loaded: LoadedModel) -> None:
    model = KVBenchVLM(loaded)
    for score in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UserError, match="never reads a stored cache"):
            score([])


def test_a_prompt_longer_than_the_model_is_refused(loaded: LoadedModel) -> None:
    text = "x" * 4096 + "<image>"
    visual = {"visual": [Image.new("RGB", (56, 56))]}
    request = Instance("generate_until", {}, (text, {}, visual), 0, ("t", 0, 1))
    with pytest.raises(UserError, match=r"has 4113 tokens, but tiny reads 4096"):
        KVBenchVLM(loaded).generate_until([request], disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_method": "kivvi"}, "did you mean kivi"),
        ({"kv_method": "kivi,skvq"}, "names 2 methods: give one"),
        ({"kv_method": "smoothquant"}, "needs calibrated statistics"),
        ({"protocol": "streaming"}, "unknown protocol 'streaming'"),
        ({"prompt_style": "chatml"}, "use chat or official"),
        ({"batch_size": "auto"}, "batch_size is auto"),
        ({"calibration": "/nowhere.safetensors"}, "no calibration can be read"),
    ],
)
def test_bad_arguments(loaded: LoadedModel, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        KVBenchVLM(loaded, **options)


def test_models_without_vision_are_refused(tiny_text_folder: Path) -> None:
    with pytest.raises(UserError, match="needs a VLM"):
        KVBenchVLM(str(tiny_text_folder), device="cpu")


def test_the_official_style_knows_its_tasks(loaded: LoadedModel) -> None:
    model = KVBenchVLM(loaded, prompt_style="official")
    doc, arguments = {"question": "?"}, ("?", {}, {"visual": []})
    request = Instance("generate_until", doc, arguments, 0, ("t", 0, 1))
    with pytest.raises(UserError, match="tasks of the group milebench"):
        model.generate_until([request], disable_tqdm=True)
    with pytest.raises(UserError, match="leave --apply_chat_template off"):
        model.apply_chat_template([{"role": "user", "content": "?"}])
