"""The twelve tasks by MileBench's folder names: instructions and how a sample is drawn."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from kvbench.errors import UserError
from kvbench.tasks.minimile.cameras import nuscenes
from kvbench.tasks.minimile.corridor import egocentric_navigation
from kvbench.tasks.minimile.drawing import Drawing
from kvbench.tasks.minimile.figures import multi_modal_qa, slide_vqa, tqa
from kvbench.tasks.minimile.film import scene_transition
from kvbench.tasks.minimile.frames import object_existence, state_change
from kvbench.tasks.minimile.motion import moving_attribute, object_interaction
from kvbench.tasks.minimile.pages import doc_vqa, web_qa

_PAINTERS: dict[str, Callable[[Random], Drawing]] = {
    "ObjectExistence": object_existence,
    "ObjectInteraction": object_interaction,
    "MovingAttribute": moving_attribute,
    "EgocentricNavigation": egocentric_navigation,
    "StateChange": state_change,
    "SceneTransition": scene_transition,
    "nuscenes": nuscenes,
    "WebQA": web_qa,
    "TQA": tqa,
    "MultiModalQA": multi_modal_qa,
    "SlideVQA": slide_vqa,
    "DocVQA": doc_vqa,
}
FOLDERS: tuple[str, ...] = tuple(_PAINTERS)
"""The twelve folders, in the order of the AKVQ-VL paper's Table II."""

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "ObjectExistence": (
        "Look at the frames of a film and answer.",
        "Answer the question about the frames.",
    ),
    "ObjectInteraction": (
        "Look at what the hand does in the film and answer.",
        "Answer the question about the hand in the film.",
    ),
    "MovingAttribute": (
        "Look at the frames of a film and answer.",
        "Answer the question about the motion in the film.",
    ),
    "EgocentricNavigation": (
        "You walk through rooms. Choose your next move.",
        "Here is what you saw on your walk. Choose the next move.",
    ),
    "StateChange": (
        "Compare the images and answer.",
        "Say what becomes different in the images.",
    ),
    "SceneTransition": (
        "Watch the scenes of the film and answer.",
        "Answer the question about the order of the scenes.",
    ),
    "nuscenes": (
        "Six cameras look around a car. Answer from their images.",
        "Answer the question about the surroundings of a car.",
    ),
    "WebQA": (
        "Read the web pages and answer.",
        "Answer the question about the web pages.",
    ),
    "TQA": (
        "Answer from the figures of the textbook.",
        "Look at the textbook's figures and answer.",
    ),
    "MultiModalQA": (
        "Answer from the table and the photos.",
        "Look up the answer in the table and the photos.",
    ),
    "SlideVQA": (
        "Read the slides and answer.",
        "Answer the question about the slides.",
    ),
    "DocVQA": (
        "Read the pages of the document and answer.",
        "Answer the question about the document.",
    ),
}
"""Folder -> the wordings of its instruction; a sample names one of them by its index."""


def draw(folder: str, rng: Random) -> Drawing:
    """Draw one sample of a task.

    Args:
        folder: one of FOLDERS.
        rng: decides everything; the same state gives the same pixels on every machine.

    Raises:
        UserError: there is no such folder.
    """
    if folder not in _PAINTERS:
        raise UserError(f"minimile has no task folder {folder!r}; it has {', '.join(FOLDERS)}.")
    return _PAINTERS[folder](rng)
