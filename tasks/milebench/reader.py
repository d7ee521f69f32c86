"""From a folder in MileBench's layout to validated samples."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.errors import UserError, brief
from kvbench.tasks.base import IMAGE_MARKER, Sample, TaskData
from kvbench.tasks.images import locate
from kvbench.tasks.milebench.record import Record, check_unicode, field, parse_record, strings
from kvbench.tasks.milebench.scoring import Metric, metric_of, true_option


@dataclass(frozen=True)
class Annotation:
    """An annotation file whose head is valid and whose entries are not looked at yet.

    Attributes:
        path: the file, absolute.
        instructions: the task's instruction wordings.
        question_type: "multi-choice" or "open-ended".
        entries: the raw entries of `data`.
    """

    path: Path
    instructions: tuple[str, ...]
    question_type: str
    entries: tuple[object, ...]

    @property
    def folder(self) -> Path:
        """The task's folder."""
        return self.path.parent

    def record(self, number: int, entry: object) -> Record:
        """Validates one entry (`number` counts from 1), its instruction's number included.

        Raises:
            UserError: the entry is not as the layout demands.
        """
        record = parse_record(entry, number, str(self.path))
        if not 0 <= record.instruction_id < len(self.instructions):
            raise UserError(
                f"{self.where(record)}: task_instruction_id {record.instruction_id} is out of "
                f"range, the file has instructions 0 to {len(self.instructions) - 1}; correct it"
            )
        if record.choices is None and self.metric() is Metric.OPTION:
            raise UserError(
                f"{self.where(record)}: key 'choice_list' is missing, but question_type is "
                f"multi-choice; add the options"
            )
        return record

    def check_new(self, record: Record, seen: set[int]) -> None:
        """Adds the record's id to `seen`.

        Raises:
            UserError: it is there already; the official code would lose one of the two.
        """
        if record.sample_id in seen:
            raise UserError(
                f"{self.where(record)}: this sample_id is used twice; give each sample its own"
            )
        seen.add(record.sample_id)

    def metric(self) -> Metric:
        """How the task's answers are judged."""
        return metric_of(self.folder.name, self.question_type)

    def where(self, record: Record) -> str:
        """The file and the sample, as error messages begin."""
        return f"{self.path}, sample {record.sample_id}"

    def sample(self, record: Record, images: tuple[Path, ...]) -> Sample:
        """The sample of a record whose images have been found."""
        return Sample(
            sample_id=record.sample_id,
            instruction=self.instructions[record.instruction_id],
            context=record.context,
            choices=record.choices,
            truth=record.truth,
            images=images,
            image_level=image_level(len(images)),
            question_type=self.question_type,
        )


def image_level(images: int) -> str:
    """MileBench's three groups, by the number of images before truncation."""
    if images < 6:
        return "Few"
    return "Medium" if images <= 31 else "Many"


def read_annotation(root: Path, folder: str) -> Annotation:
    """Reads `root`/`folder`/`folder`.json and validates all but the entries of `data`.

    Raises:
        UserError: the root, the folder or the file is missing, the JSON is broken, or the head
            is not as the layout demands.
    """
    path = _annotation_path(root, folder)
    content = _parse(path)
    meta = field(content, "meta_data", dict, str(path))
    instructions = strings(meta, "task_instruction", f"{path}, meta_data")
    question_type = field(meta, "question_type", str, f"{path}, meta_data")
    entries = field(content, "data", list, str(path))
    if not entries:
        raise UserError(f"{path}: data holds no samples; restore the original file")
    check_unicode("".join(instructions), f"{path}, meta_data")
    if any(IMAGE_MARKER in instruction for instruction in instructions):
        raise UserError(f"{path}: an instruction holds {IMAGE_MARKER}; instructions have no images")
    annotation = Annotation(path, instructions, question_type, tuple(entries))
    try:
        annotation.metric()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return annotation


def read_task(root: Path, folder: str) -> TaskData:
    """Reads and validates a whole task; images must be there but are not opened.

    Raises:
        UserError: anything is missing or not as the layout demands; the message names the file,
            the sample and the cure.
    """
    annotation = read_annotation(root, folder)
    seen: set[int] = set()
    samples = []
    for number, entry in enumerate(annotation.entries, start=1):
        record = annotation.record(number, entry)
        annotation.check_new(record, seen)
        check_truth(annotation, record)
        where = annotation.where(record)
        images = tuple(locate(annotation.folder, name, where) for name in record.image_names)
        samples.append(annotation.sample(record, images))
    return TaskData(tuple(samples), annotation.question_type)


def check_truth(annotation: Annotation, record: Record) -> None:
    """Checks that a multiple-choice record's truth is one of its options.

    Raises:
        UserError: it isn't, even after normalisation.
    """
    if annotation.metric() is not Metric.OPTION:
        return
    choices = record.choices or ()
    if true_option(choices, record.truth) is None:
        raise UserError(
            f"{annotation.where(record)}: the response '{brief(record.truth)}' is not among its "
            f"{len(choices)} options; correct response or choice_list"
        )


def _annotation_path(root: Path, folder: str) -> Path:
    if not root.is_dir():
        raise UserError(
            f"data root {root} is not a folder; pass --data-root or set KVBENCH_DATA to the "
            f"folder that holds {folder}/{folder}.json"
        )
    task_folder = root.resolve() / folder
    if not task_folder.is_dir():
        raise UserError(
            f"task folder {folder} is missing in data root {root}; unpack MileBench's archive "
            f"that holds it there, or choose other tasks"
        )
    path = task_folder / f"{folder}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; unpack MileBench's archive again or restore the file")
    return path


def _parse(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_object)
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror}); check its rights") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore the original file") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: must hold an object with meta_data and data; restore the original file"
        )
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that stands twice, plain `json` would drop the first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key '{brief(twice)}' stands twice in one object")
    return found
