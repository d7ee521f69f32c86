"""One entry of an annotation file, validated field by field without touching any image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError, brief
from kvbench.tasks.base import IMAGE_MARKER
from kvbench.tasks.milebench.prompt import PLACEHOLDER, full_text

_KINDS = {str: "a string", list: "a list", dict: "an object", int: "an integer"}


@dataclass(frozen=True)
class Record:
    """An entry's fields as the benchmark's code reads them; image names are unresolved.

    Attributes:
        sample_id: the entry's own id.
        instruction_id: zero-based index of its instruction wording.
        context: text with placeholders.
        choices: option texts, None where the file has no `choice_list`.
        truth: the response as a string.
        image_names: file names relative to the task's `images` folder.
    """

    sample_id: int
    instruction_id: int
    context: str
    choices: tuple[str, ...] | None
    truth: str
    image_names: tuple[str, ...]


def field(holder: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """`holder[key]`, checked to be of the JSON type `kind`; true and false are no integers.

    Raises:
        UserError: the key is missing or holds something else.
    """
    if key not in holder:
        raise UserError(f"{where}: key {key!r} is missing; add it or restore the original file")
    value = holder[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{where}: {key} must be {_KINDS[kind]}, not {_shown(value)}; correct the file"
        )
    return value


def strings(holder: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """`holder[key]`, checked to be a list of strings with at least one entry.

    Raises:
        UserError: it isn't.
    """
    values = field(holder, key, list, where)
    if not values:
        raise UserError(f"{where}: {key} is empty; give it at least one entry")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise UserError(
                f"{where}: entry {number} of {key} must be a string, not {_shown(value)}; "
                f"put it in quotes"
            )
    return tuple(values)


def parse_record(entry: object, number: int, path: str) -> Record:
    """Validates entry `number` (from 1) of the file `path`.

    Raises:
        UserError: a key is missing, a value has the wrong type, or a placeholder has no image.
    """
    where = f"{path}, entry {number} of data"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object, not {_shown(entry)}; correct the file")
    sample_id = field(entry, "sample_id", int, where)
    if not -(2**63) <= sample_id < 2**63:
        raise UserError(f"{where}: sample_id {sample_id} doesn't fit 64 bits; use smaller numbers")
    where = f"{path}, sample {sample_id}"
    instance = field(entry, "task_instance", dict, where)
    field(entry, "image_quantity_level", str, where)
    record = Record(
        sample_id=sample_id,
        instruction_id=field(entry, "task_instruction_id", int, where),
        context=field(instance, "context", str, where),
        choices=_choices(instance, where),
        truth=_truth(entry, where),
        image_names=strings(instance, "images_path", where),
    )
    text = full_text(record.context, record.choices)
    check_unicode(text + record.truth, where)
    check_placeholders(text, len(record.image_names), where)
    return record


def check_unicode(text: str, where: str) -> None:
    r"""Checks that `text` can be written as UTF-8: JSON allows half characters such as "\ud83d".

    Raises:
        UserError: it can't.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: the text holds {text[error.start]!a}, which is half a character; "
            f"correct the escape in the file"
        ) from error


def check_placeholders(text: str, images: int, where: str) -> None:
    """Checks that every placeholder in `text` names an image of its own.

    Fewer placeholders than images are allowed: images are aligned from the end.

    Raises:
        UserError: a placeholder's number is not 1 ... `images`, or is used twice, or the text
            holds the marker that placeholders are replaced by.
    """
    if IMAGE_MARKER in text:
        raise UserError(
            f"{where}: the text holds {IMAGE_MARKER} itself, which would stand for an image; "
            f"write a placeholder such as {{image#1}} instead"
        )
    known, used = {str(k) for k in range(1, images + 1)}, set()
    for match in PLACEHOLDER.finditer(text):
        number = match[1]
        if number not in known:
            raise UserError(
                f"{where}: placeholder {brief(match[0])} has no image, images_path has {images}; "
                f"add the image or correct the number"
            )
        if number in used:
            raise UserError(
                f"{where}: placeholder number {number} is used twice, but each place takes an "
                f"image of its own; list the image once more in images_path under a new number"
            )
        used.add(number)


def _choices(instance: Mapping[str, Any], where: str) -> tuple[str, ...] | None:
    if "choice_list" not in instance:
        return None
    if instance["choice_list"] is None:
        raise UserError(
            f"{where}: choice_list is null; list the options, or leave the key out for an "
            f"open-ended question"
        )
    return strings(instance, "choice_list", where)


def _truth(entry: Mapping[str, Any], where: str) -> str:
    if "response" not in entry:
        raise UserError(f"{where}: key 'response' is missing; add it or restore the original file")
    value = entry["response"]
    if value is None or isinstance(value, list | dict):
        raise UserError(
            f"{where}: response must be a string or a number, not {_shown(value)}; correct the file"
        )
    return str(value)


def _shown(value: object) -> str:
    """A JSON value, short enough for an error message."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "something nested that deeply"
    return text if len(text) <= 60 else text[:57] + "..."
