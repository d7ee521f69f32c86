"""What a task is to the rest of the harness: samples in, prompts out, answers scored."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kvbench.errors import UserError

if TYPE_CHECKING:
    import datasets

IMAGE_MARKER = "<ImageHere>"
"""Where an image stands in `Prompt.text`; model families replace it by their own token."""


class Tokens(Protocol):
    """The tokenizer as prompt building needs it: no special tokens in either direction."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`."""


@dataclass(frozen=True)
class Sample:
    """One validated question.

    Attributes:
        sample_id: unique in its task.
        instruction: the task's wording that this sample uses, unchanged.
        context: text and question with `{image#k}` or `{table#k}` placeholders, without options.
        choices: option texts without letters; None for open-ended questions.
        truth: the right answer; for multiple choice the option's text, not its letter.
        images: absolute paths inside the task's folder, in placeholder order.
        image_level: "Few" (under 6 images), "Medium" (6 to 31) or "Many".
        question_type: "multi-choice" or "open-ended".
    """

    sample_id: int
    instruction: str
    context: str
    choices: tuple[str, ...] | None
    truth: str
    images: tuple[Path, ...]
    image_level: str
    question_type: str = "multi-choice"

    def row(self) -> dict[str, Any]:
        """The sample as plain values: image paths become strings."""
        return {
            "sample_id": self.sample_id,
            "instruction": self.instruction,
            "context": self.context,
            "choices": None if self.choices is None else list(self.choices),
            "truth": self.truth,
            "images": [str(path) for path in self.images],
            "image_level": self.image_level,
            "question_type": self.question_type,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """The sample that `row()` wrote; further keys of `row` are ignored."""
        return cls(
            sample_id=row["sample_id"],
            instruction=row["instruction"],
            context=row["context"],
            choices=None if row["choices"] is None else tuple(row["choices"]),
            truth=row["truth"],
            images=tuple(Path(path) for path in row["images"]),
            image_level=row["image_level"],
            question_type=row["question_type"],
        )


@dataclass(frozen=True)
class Prompt:
    """A sample's prompt before the newline rule and the chat template.

    Attributes:
        text: instruction and text with one `IMAGE_MARKER` for each kept image.
        images: the kept images' paths, in order.
        images_total: how many images the sample has.
        truncated: whether text or images were dropped for want of room.
    """

    text: str
    images: tuple[Path, ...]
    images_total: int
    truncated: bool


@dataclass(frozen=True)
class Score:
    """What one answer earned.

    Attributes:
        correct: right by the benchmark's own rules.
        strict: the answer is exactly the right letter, or the right option's text, or both.
        empty: nothing is left of the answer after normalisation.
        unparsable: not empty, and what was extracted is not exactly one option's label.
        extracted: what the benchmark's rules took for the answer.
        value: the benchmark's own number: 1.0 or 0.0 for accuracy, F for ROUGE-L.
    """

    correct: bool
    strict: bool
    empty: bool
    unparsable: bool
    extracted: str
    value: float


@dataclass(frozen=True)
class TaskData:
    """A task's samples in the file's order."""

    samples: tuple[Sample, ...]
    question_type: str

    def dataset(self) -> datasets.Dataset:
        """The samples as a `datasets.Dataset`; images stay path strings."""
        from datasets import Dataset

        return Dataset.from_list([sample.row() for sample in self.samples])


@dataclass(frozen=True)
class Task(ABC):
    """A named task.

    Attributes:
        name: what the command line calls it, as "oe".
        label: its column in tables, as "OE".
        title: its full name, as "Object Existence".
        folder: its folder below the data root and the stem of its annotation file.
        version: raised whenever prompts or scores change for the same data.
        suite: which set it belongs to. "all" means kvbench's own tasks of the suite "milebench";
            a plug-in's task is only run when it is named.
    """

    name: str
    label: str
    title: str
    folder: str
    version: int = 1
    suite: str = "milebench"

    @abstractmethod
    def load(self, root: Path) -> TaskData:
        """Reads and validates the task's folder below `root`.

        Raises:
            UserError: data are missing or not as the layout demands.
        """

    @abstractmethod
    def prompt(
        self, sample: Sample, tokenizer: Tokens, max_context_len: int, tokens_per_image: int
    ) -> Prompt:
        """Builds a sample's prompt within a budget of `max_context_len` tokens.

        Raises:
            UserError: the instruction alone fills the budget.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: str) -> Score:
        """Scores a decoded answer."""

    def user_turn(self, prompt: Prompt) -> str:
        """What stands in the user's turn, with one `IMAGE_MARKER` for each image."""
        return prompt.text

    @abstractmethod
    def default_root(self) -> Path:
        """The bundled data for this task, made on first use.

        Raises:
            UserError: they can't be made here.
        """

    def calibration_root(self, samples: int) -> Path:
        """Data of this task's kind that nobody scores, of `samples` samples a task.

        Raises:
            UserError: there are none, or they can't be made here.
        """
        raise UserError(f"task {self.name} has no data to calibrate on: name a folder with --data")


def dataset_name(root: Path) -> str:
    """The data's name: "minimile-1-seed0" by a generator's manifest, else "milebench"."""
    for path in sorted(root.glob("*.json")):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            return f"{made['generator']}-{made['version']}-seed{made['seed']}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "milebench"
