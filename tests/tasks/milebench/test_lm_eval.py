from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.registry import TASKS
from kvbench.tasks.milebench.lm_eval import INCLUDE_PATH, functions

NAMES = [name for name in TASKS.names() if TASKS.get(name).suite == "milebench"]
ALL = {f"milebench_{name}" for name in NAMES}


def manager(**metadata: Any) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(
        include_path=str(INCLUDE_PATH), include_defaults=False, metadata=metadata or None
    )


def test_twelve_tasks_and_the_group_are_found() -> None:
    found = manager()
    assert set(found.all_subtasks) == ALL
    assert found.all_groups == ["milebench"]


def test_the_group_loads_documents_from_the_environment(
    full_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBENCH_DATA", str(full_root))
    tasks = manager().load(["milebench"])["tasks"]
    assert set(tasks) == ALL
    for name, task in tasks.items():
        docs = list(task.test_docs())
        assert [doc["sample_id"] for doc in docs] == [0, 1]
        assert f"milebench_{docs[0]['task']}" == name
        assert TASKS.get(docs[0]["task"]).version == task.VERSION


def test_documents_make_prompts_and_opened_images(make_task) -> None:
    root = make_task("TQA")
    task = manager(data_root=str(root)).load(["milebench_tqa"])["tasks"]["milebench_tqa"]
    doc = task.test_docs()[1]
    assert task.doc_to_text(doc) == (
        "Look and choose.\n<image>\n<image>\nWhich colour does image 1 show?"
        "\nChoice list: \nA. red\nB. green\nC. blue\nYour answer is: "
    )
    assert [image.getpixel((0, 0)) for image in task.doc_to_image(doc)] == [
        (80, 0, 30),
        (80, 200, 30),
    ]
    assert task.doc_to_target(doc) == "green"


def test_images_as_paths_when_the_metadata_say_so(make_task) -> None:
    root = make_task("TQA")
    found = manager(data_root=str(root), image_paths=True)
    task = found.load(["milebench_tqa"])["tasks"]["milebench_tqa"]
    folder = (root / "TQA" / "images").resolve()
    assert task.doc_to_image(task.test_docs()[0]) == [f"{folder}/0_0.png", f"{folder}/0_1.png"]


def test_text_and_images_agree_when_placeholders_are_fewer(make_task) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["data"][0]["task_instance"]["context"] = "Which?"

    doc = functions.custom_dataset("tqa", str(make_task(edit=edit)), image_paths=True)["test"][0]
    assert functions.doc_to_text(doc).startswith("Look and choose.\n<image>Which?")
    assert [Path(path).name for path in functions.doc_to_image(doc)] == ["0_1.png"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", {"acc": 1.0, "strict": 1.0, "empty": 0.0, "unparsable": 0.0}),
        ("It is green", {"acc": 1.0, "strict": 0.0, "empty": 0.0, "unparsable": 0.0}),
        (" ", {"acc": 0.0, "strict": 0.0, "empty": 1.0, "unparsable": 0.0}),
        ("A or B", {"acc": 0.0, "strict": 0.0, "empty": 0.0, "unparsable": 1.0}),
    ],
)
def test_results(make_task, answer: str, expected: dict[str, float]) -> None:
    doc = functions.custom_dataset("tqa", str(make_task()))["test"][0]
    assert functions.process_results(doc, [answer]) == expected


def test_no_data_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVBENCH_DATA", raising=False)
    with pytest.raises(UserError, match="set KVBENCH_DATA or pass --metadata"):
        functions.custom_dataset("tqa")


def test_greedy_generation() -> None:
    template = (INCLUDE_PATH / "_milebench.yaml").read_text()
    assert "do_sample: false" in template
    assert "temperature: 0.0" in template


@pytest.mark.slow
def test_stock_model_class_runs_the_group(
    tiny_llava_folder: Path, full_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model="hf-multimodal",
        model_args={"pretrained": str(tiny_llava_folder), "dtype": "float32", "device": "cpu"},
        tasks=["milebench"],
        task_manager=manager(data_root=str(full_root)),
        gen_kwargs="max_gen_toks=4",
        batch_size=1,
        limit=1,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert set(results["samples"]) == ALL
    scores = [results["results"][name]["acc,none"] for name in sorted(ALL)]
    assert results["groups"]["milebench"]["acc,none"] == pytest.approx(sum(scores) / 12)
    for samples in results["samples"].values():
        assert len(samples) == 1
        assert samples[0]["arguments"][0][0].count("<image>") == 2
        json.dumps(samples[0]["resps"])
