"""What is in a data root: one report a task, which counts faults instead of stopping at one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from kvbench.errors import UserError
from kvbench.tasks.base import IMAGE_MARKER
from kvbench.tasks.images import locate, open_image
from kvbench.tasks.milebench.catalog import TASKS
from kvbench.tasks.milebench.prompt import full_text, place_markers
from kvbench.tasks.milebench.reader import Annotation, check_truth, read_annotation
from kvbench.tasks.milebench.record import Record
from kvbench.tasks.milebench.task import MileBenchTask


@dataclass
class TaskReport:
    """What was found in one task's folder.

    Attributes:
        task: the task.
        readable: whether folder and annotation file are there and the file's head is valid.
        samples: entries in the annotation file.
        invalid: entries that break the layout's rules, images aside.
        truth_missing: valid questions whose truth is not among their options.
        misaligned: valid questions with fewer placeholders than images; their images are
            aligned from the end.
        options: number of valid questions by their number of options.
        images: number of images of each valid question.
        files: distinct image files found.
        missing: image names without a file inside the folder.
        broken: files found that can't be opened.
        problems: a sentence for each fault, with its cure.
    """

    task: MileBenchTask
    readable: bool = False
    samples: int = 0
    invalid: int = 0
    truth_missing: int = 0
    misaligned: int = 0
    options: Counter[int] = field(default_factory=Counter)
    images: list[int] = field(default_factory=list)
    files: int = 0
    missing: int = 0
    broken: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the task can be evaluated."""
        return not self.problems


def check(root: Path, tasks: Iterable[MileBenchTask] | None = None) -> list[TaskReport]:
    """Examines `root`, opening every image once.

    Args:
        root: the data root.
        tasks: which tasks to look for; by default MileBench's twelve, and every other task in
            its layout whose folder is there.

    Returns:
        One report a task, also for a task whose folder is missing.

    Raises:
        UserError: `root` itself is not a folder. Nothing inside it raises.
    """
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder; pass the folder that holds the tasks")
    if tasks is None:
        known = TASKS.values()
        tasks = [t for t in known if t.suite == "milebench" or (root / t.folder).is_dir()]
    return [check_task(root, task) for task in tasks]


def check_task(root: Path, task: MileBenchTask) -> TaskReport:
    """Examines one task's folder; never raises on bad data."""
    report = TaskReport(task)
    try:
        annotation = read_annotation(root, task.folder)
    except UserError as error:
        report.problems.append(str(error))
        return report
    report.readable, report.samples = True, len(annotation.entries)
    files: dict[Path, None] = {}
    for record in _valid_records(annotation, report):
        _count(annotation, record, report)
        files |= dict.fromkeys(_found(annotation, record, report))
    report.files = len(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(_fault, files) if fault]
    report.broken = len(faults)
    report.problems += faults
    return report


def _valid_records(annotation: Annotation, report: TaskReport) -> Iterator[Record]:
    seen: set[int] = set()
    for number, entry in enumerate(annotation.entries, start=1):
        try:
            record = annotation.record(number, entry)
            annotation.check_new(record, seen)
        except UserError as error:
            report.invalid += 1
            report.problems.append(str(error))
            continue
        yield record


def _count(annotation: Annotation, record: Record, report: TaskReport) -> None:
    report.images.append(len(record.image_names))
    text = full_text(record.context, record.choices)
    markers = place_markers(text, len(record.image_names)).count(IMAGE_MARKER)
    report.misaligned += markers < len(record.image_names)
    if record.choices is not None:
        report.options[len(record.choices)] += 1
    try:
        check_truth(annotation, record)
    except UserError as error:
        report.truth_missing += 1
        report.problems.append(str(error))


def _found(annotation: Annotation, record: Record, report: TaskReport) -> Iterator[Path]:
    for name in record.image_names:
        try:
            yield locate(annotation.folder, name, annotation.where(record))
        except UserError as error:
            report.missing += 1
            report.problems.append(str(error))


def _fault(path: Path) -> str | None:
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return None


def report_rows(reports: Iterable[TaskReport]) -> list[dict[str, str]]:
    """The reports as table rows, column title to cell."""
    return [_row(report) for report in reports]


def _row(report: TaskReport) -> dict[str, str]:
    head = {"task": report.task.name, "folder": report.task.folder}
    if not report.readable:
        return head | dict.fromkeys(_COUNTS, "-") | {"state": "unreadable"}
    cells = (
        str(report.samples),
        str(report.invalid),
        _spread(report.options.elements(), average=False),
        str(report.truth_missing),
        _spread(report.images, average=True),
        str(report.misaligned),
        str(report.files),
        str(report.missing),
        str(report.broken),
    )
    state = "ok" if report.ok else f"{len(report.problems)} faults"
    return head | dict(zip(_COUNTS, cells, strict=True)) | {"state": state}


_COUNTS = (
    "samples",
    "invalid",
    "options",
    "truth not in options",
    "images (min/mean/max)",
    "fewer placeholders",
    "files",
    "missing",
    "broken",
)


def _spread(values: Iterable[int], average: bool) -> str:
    known = sorted(values)
    if not known:
        return "-"
    if average:
        return f"{known[0]} / {sum(known) / len(known):.1f} / {known[-1]}"
    return str(known[0]) if known[0] == known[-1] else f"{known[0]}-{known[-1]}"
