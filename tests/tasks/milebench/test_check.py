from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.tasks.milebench import TASKS, check, report_rows


def test_a_good_root(full_root: Path) -> None:
    reports = check(full_root)
    assert [report.task.name for report in reports] == (
        ["oe", "oi", "ma", "en", "sc", "st", "su", "wqa", "tqa", "mqa", "sqa", "dqa"]
    )
    assert all(report.ok for report in reports)
    assert report_rows(reports)[0] == {
        "task": "oe",
        "folder": "ObjectExistence",
        "samples": "2",
        "invalid": "0",
        "options": "3",
        "truth not in options": "0",
        "images (min/mean/max)": "2 / 2.0 / 2",
        "fewer placeholders": "0",
        "files": "4",
        "missing": "0",
        "broken": "0",
        "state": "ok",
    }


def test_missing_folders_are_reported_one_by_one(make_task) -> None:
    reports = check(make_task("DocVQA"))
    assert [report.task.name for report in reports if report.readable] == ["dqa"]
    assert [len(report.problems) for report in reports] == [1] * 11 + [0]
    assert "task folder nuscenes is missing" in reports[6].problems[0]
    row = report_rows(reports)[6]
    assert (row["state"], row["samples"]) == ("unreadable", "-")


def test_other_tasks_are_checked_where_they_are(make_task, full_root: Path) -> None:
    make_task("EasyVQA")
    assert [report.task.name for report in check(full_root)][12:] == ["easy_vqa"]


def faulty(content: dict[str, Any]) -> None:
    data = content["data"]
    data[1]["sample_id"] = 0
    data[2]["response"] = "violet"
    data[3]["task_instance"]["choice_list"] = None
    data[4]["task_instance"]["images_path"] = ["gone.png", "4_1.png"]
    data[5]["task_instance"]["context"] = "{image#1}?"
    data[6]["task_instance"]["choice_list"] = ["red", "green", "blue", "grey", "pink"]
    data[6]["task_instance"]["images_path"] = ["6_0.png", "6_1.png", "0_0.png", "0_0.png"]
    data[7] = "no object"
    data[8]["task_instance"]["images_path"] = ["../../x.png", "8_1.png"]


def test_every_fault_is_counted(make_task, root: Path) -> None:
    make_task("TQA", samples=10, edit=faulty)
    broken = root / "TQA" / "images" / "9_0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    (report,) = check(root, [TASKS["tqa"]])
    assert (report.samples, report.invalid, report.truth_missing) == (10, 3, 1)
    assert (report.missing, report.broken) == (2, 1)
    assert report.misaligned == 2  # samples 5 and 6
    assert report.options == {3: 6, 5: 1}
    assert sorted(report.images) == [2, 2, 2, 2, 2, 2, 4]
    # Samples 0, 2, 5, 9 have two files each, 4 and 8 one, 6 two of its own.
    assert report.files == 12
    assert len(report.problems) == 3 + 1 + 2 + 1
    (row,) = report_rows([report])
    assert row["images (min/mean/max)"] == "2 / 2.3 / 4"
    assert row["options"] == "3-5"
    assert row["state"] == "7 faults"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"meta_data": {}, "data": 3}', b"\xff"])
def test_unreadable_annotations_do_not_raise(make_task, root: Path, content: bytes) -> None:
    make_task("TQA")
    (root / "TQA" / "TQA.json").write_bytes(content)
    (report,) = check(root, [TASKS["tqa"]])
    assert (report.readable, len(report.problems)) == (False, 1)


def test_nothing_usable_still_makes_a_row(make_task, root: Path) -> None:
    make_task("TQA", edit=lambda content: content.update(data=[1, 2]))
    (row,) = report_rows(check(root, [TASKS["tqa"]]))
    assert (row["samples"], row["invalid"], row["options"]) == ("2", "2", "-")
    assert row["images (min/mean/max)"] == "-"


def test_a_root_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        check(tmp_path / "nowhere")
