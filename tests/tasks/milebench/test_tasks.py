from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.registry import TASKS
from kvbench.tasks.base import Sample
from kvbench.tasks.milebench import MileBenchTask

PAPER = {
    "oe": "ObjectExistence",
    "oi": "ObjectInteraction",
    "ma": "MovingAttribute",
    "en": "EgocentricNavigation",
    "sc": "StateChange",
    "st": "SceneTransition",
    "su": "nuscenes",
    "wqa": "WebQA",
    "tqa": "TQA",
    "mqa": "MultiModalQA",
    "sqa": "SlideVQA",
    "dqa": "DocVQA",
}


class Characters:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(index) for index in ids)


def test_the_papers_tasks_in_the_papers_order() -> None:
    suite = [TASKS.get(name) for name in TASKS.names() if TASKS.get(name).suite == "milebench"]
    assert {task.name: task.folder for task in suite} == PAPER
    assert [task.name for task in suite] == list(PAPER)
    assert [task.label for task in suite] == [name.upper() for name in PAPER]


def test_easy_vqa_is_a_suite_of_its_own() -> None:
    task = TASKS.get("easy_vqa")
    assert (task.folder, task.suite) == ("EasyVQA", "easy_vqa")


def test_load_prompt_score(make_task) -> None:
    task = TASKS.get("su")
    sample = task.load(make_task("nuscenes")).samples[0]
    prompt = task.prompt(sample, Characters(), 1000, 64)
    assert prompt.text == (
        "Look and choose.\n<ImageHere><ImageHere>Which colour does image 0 show?"
        "\nChoice list: \nA. red\nB. green\nC. blue\nYour answer is: "
    )
    assert prompt.images == sample.images
    assert task.score(sample, "B").strict
    assert not task.score(sample, "C").correct


def test_gpr1200_has_no_letters() -> None:
    task = MileBenchTask("gpr", "GPR", "GPR1200", "GPR1200", suite="other")
    sample = Sample(0, "I", "Q", ("x", "y"), "x", (Path("/1.png"),), "Few")
    assert "Choice list: \nx\ny\nYour" in task.prompt(sample, Characters(), 1000, 1).text


@pytest.mark.parametrize("folder", ["TextNeedleInAHaystack", "MMCoQA"])
def test_the_folder_chooses_the_metric(folder: str) -> None:
    task = MileBenchTask("x", "X", "X", folder, suite="other")
    sample = Sample(0, "I", "Q", None, "oslo", (), "Few", "open-ended")
    assert task.score(sample, "It is Oslo").correct


def test_importing_tasks_imports_nothing_heavy() -> None:
    code = (
        "import sys, kvbench.tasks.milebench\n"
        "heavy = {'torch', 'datasets', 'transformers', 'PIL', 'lm_eval'}\n"
        "print(*(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")
