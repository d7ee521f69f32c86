"""From a task's folder to model inputs: which samples, their prompts, their images."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.registry import TASKS
from kvbench.tasks.images import image_bytes

if TYPE_CHECKING:
    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel
    from kvbench.tasks.base import Prompt, Sample, Score, Task


@dataclass(frozen=True)
class Cell:
    """The samples of one task that a run scores."""

    task: Task
    dataset: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Question:
    """One sample as one model is asked it."""

    task: Task
    sample: Sample
    prompt: Prompt
    text: str
    prompt_sha256: str
    images_sha256: str

    def score(self, answer: str) -> Score:
        """Score a decoded answer by the task's rules."""
        return self.task.score(self.sample, answer)


def read_cell(name: str, root: Path | None, limit: int | None, seed: int) -> Cell:
    """Read a task, from its bundled data if no root is given, and choose the samples.

    Raises:
        UserError: the data are missing or not as they should be.
    """
    from kvbench.tasks.base import dataset_name

    task = TASKS.get(name)
    folder = root or task.default_root()
    samples = task.load(folder).samples
    if limit is not None and limit < len(samples):
        chosen = sorted(random.Random(f"{seed}/{name}").sample(range(len(samples)), limit))
        samples = tuple(samples[index] for index in chosen)
    return Cell(task, dataset_name(folder), samples)


def ask(loaded: LoadedModel, task: Task, sample: Sample) -> Question:
    """Build a sample's prompt for a model.

    Raises:
        UserError: the instruction alone fills the model's context, or an image can't be read.
    """
    entry = loaded.entry
    try:
        prompt = task.prompt(sample, loaded.tokens, entry.max_context_len, entry.tokens_per_image)
    except UserError as error:
        raise UserError(f"{task.folder}, {error}") from error
    text = task.user_turn(prompt)
    full = hashlib.sha256(loaded.style.render(text).encode()).hexdigest()
    with _named(task, sample):
        pictures = images_hash(prompt.images)
    return Question(task, sample, prompt, text, full, pictures)


@contextmanager
def _named(task: Task, sample: Sample) -> Iterator[None]:
    """Says whose images can't be used."""
    try:
        yield
    except UserError as error:
        raise UserError(f"sample {sample.sample_id} of {task.folder}: {error}") from error


def encoded(loaded: LoadedModel, questions: Sequence[Question]) -> ModelInputs:
    """Open the images and encode the prompts as one batch.

    Raises:
        UserError: an image is broken, or a prompt is longer than the model.
    """
    from kvbench.models.inputs import batch

    return batch([_encoded(loaded, question) for question in questions], loaded.pad_id)


def _encoded(loaded: LoadedModel, question: Question) -> ModelInputs:
    from kvbench.models.inputs import encode
    from kvbench.tasks.images import open_image

    with _named(question.task, question.sample):
        images = [open_image(path) for path in question.prompt.images]
    where = f"sample {question.sample.sample_id} of {question.task.folder}"
    return encode(loaded, question.text, images, where=where)


def images_hash(paths: Sequence[Path]) -> str:
    """Return the SHA-256 (hex) over the files, each after its length in eight bytes.

    Raises:
        UserError: a file can't be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        content = image_bytes(path)
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()
