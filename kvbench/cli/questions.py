"""Questions and pictures for the page of a run: rows hold neither, so the data are read again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.evaluation.rows import SampleRow
    from kvbench.report.html.samples import Question
    from kvbench.tasks.base import Sample

Found = dict[tuple[str, str], dict[int, "Question"]]

_MINIMILE = re.compile(r"minimile-(\d+)-seed(\d+)")


def read_questions(rows: Sequence[SampleRow], data: Path | None) -> tuple[Found, list[str]]:
    """Read the questions that rows answer, with a small picture of each one's images.

    Args:
        rows: Result rows of any data sets and tasks.
        data: Folder in MileBench's layout. Generated sets are made again where it isn't theirs.

    Returns:
        Questions by data set and task, then by sample; and what could not be had, in sentences.
    """
    from kvbench.report.html.thumbnails import BUDGET

    wanted: dict[tuple[str, str], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for row in rows:
        whole = row.images_kept == row.images_total
        wanted[row.dataset, row.task][row.sample_id] |= {row.images_sha256} if whole else set()
    room = BUDGET // max(1, sum(map(len, wanted.values())))
    found: Found = {}
    remarks = []
    for (dataset, task), samples in wanted.items():
        try:
            loaded = _load(dataset, task, data, most=max(samples) + 1)
        except UserError as error:
            remarks.append(f"No questions of {task} ({dataset}): {str(error).rstrip('.')}.")
            continue
        found[dataset, task] = {
            sample.sample_id: _question(sample, samples[sample.sample_id], room)
            for sample in loaded
            if sample.sample_id in samples
        }
    return found, remarks


def _load(dataset: str, task: str, data: Path | None, most: int) -> Sequence[Sample]:
    from kvbench.registry import TASKS
    from kvbench.tasks.base import dataset_name

    known = TASKS.get(task)
    if data is not None and dataset_name(data) == dataset:
        return known.load(data).samples
    if dataset == "milebench":
        raise UserError("name their folder with --data")
    root = _generated(dataset, most) or known.default_root()
    if dataset_name(root) != dataset:
        raise UserError(f"{dataset} is not what kvbench makes: name its folder with --data")
    return known.load(root).samples


def _generated(dataset: str, most: int) -> Path | None:
    """The folder of a minimile of any seed, made in the user's cache if need be."""
    from kvbench.tasks.minimile import VERSION, cached_root
    from kvbench.tasks.minimile.writer import SAMPLES

    match = _MINIMILE.fullmatch(dataset)
    if match is None or int(match[1]) != VERSION:
        return None
    return cached_root(int(match[2]), max(SAMPLES, most))


def _question(sample: Sample, hashes: set[str], room: int) -> Question:
    from kvbench.evaluation.samples import images_hash
    from kvbench.report.html.samples import Question
    from kvbench.report.html.thumbnails import MOST, contact_sheet
    from kvbench.tasks.images import open_image

    sheet, remark = None, ""
    try:
        if hashes and images_hash(sample.images) not in hashes:
            remark = "No picture: the images of the data are not those of the run."
        else:
            images = [open_image(path) for path in sample.images[:MOST]]
            sheet = contact_sheet(images, len(sample.images), room)
            if not hashes:
                remark = "Images were left out of the prompt; which ones, rows don't say."
    except UserError as error:
        remark = f"No picture: {str(error).rstrip('.')}."
    return Question(sample.instruction, sample.context, sample.choices, sample.truth, sheet, remark)
