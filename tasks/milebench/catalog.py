"""The tasks in MileBench's layout, by the names the command line uses."""

from __future__ import annotations

from kvbench.tasks.milebench.task import MileBenchTask

# In the column order of the AKVQ-VL paper's Table II. MileBench has no folder called "Space
# Understanding"; nuscenes is that group's only member.
_TABLE_II = (
    ("oe", "Object Existence", "ObjectExistence"),
    ("oi", "Object Interaction", "ObjectInteraction"),
    ("ma", "Moving Attribute", "MovingAttribute"),
    ("en", "Egocentric Navigation", "EgocentricNavigation"),
    ("sc", "State Change", "StateChange"),
    ("st", "Scene Transition", "SceneTransition"),
    ("su", "Space Understanding", "nuscenes"),
    ("wqa", "Webpage QA", "WebQA"),
    ("tqa", "Textbook QA", "TQA"),
    ("mqa", "Multimodal QA", "MultiModalQA"),
    ("sqa", "Slide VQA", "SlideVQA"),
    ("dqa", "Document QA", "DocVQA"),
)

EASY_VQA = MileBenchTask("easy_vqa", "easy-VQA", "easy-VQA", "EasyVQA", suite="easy_vqa")
"""Third-party images and questions, written in MileBench's layout; not part of "all"."""

TASKS: dict[str, MileBenchTask] = {
    name: MileBenchTask(name, name.upper(), title, folder) for name, title, folder in _TABLE_II
} | {EASY_VQA.name: EASY_VQA}
