"""Reports of an output folder: files, the terminal, and what a broken folder says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.report import leaderboard_markdown, print_summary, read_results, write_report

RUN = {"request": {"command": "kvbench eval --limit 4", "samples": {"oe": 4, "st": 4, "su": 2}}}


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def store(folder: Path, rows: list[SampleRow]) -> None:
    lines = [row.to_json() + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def test_the_files_are_made_from_rows_and_run(tmp_path: Path, small_run: list[SampleRow]) -> None:
    store(tmp_path, small_run)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    written = write_report(tmp_path)
    names = ["table2.md", "table2.csv", "details.md", "details.csv"]
    assert written == [tmp_path / name for name in names]
    assert (tmp_path / "table2.md").read_text() == leaderboard_markdown(small_run, RUN)
    assert "`kvbench eval --limit 4`" in (tmp_path / "details.md").read_text()
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in write_report(tmp_path)] == first


def test_planned_tasks_have_a_column_from_the_start(small_run: list[SampleRow]) -> None:
    table = leaderboard_markdown(small_run, RUN).splitlines()
    assert [cell.strip() for cell in table[13].split("|")[3:6]] == ["OE", "ST", "SU"]
    assert "75.0 (2 of 3 tasks)" in table[15]
    assert "samples a task: 4" in leaderboard_markdown(small_run)


def test_a_task_is_unfinished_until_all_planned_samples_are_there(
    small_run: list[SampleRow],
) -> None:
    markdown = leaderboard_markdown(small_run, {"request": {"samples": {"oe": 10}}})
    assert "samples a task: 4 to 10" in markdown
    assert "75.0 (n=4)" in markdown


def test_the_paper_has_its_own_files(
    tmp_path: Path, make_rows: Callable[..., list[SampleRow]]
) -> None:
    store(tmp_path, make_rows("fp16", "oe", "+", model="llava15_7b", dataset="milebench"))
    assert [path.name for path in write_report(tmp_path)][4:] == ["paper.md", "paper.csv"]
    assert "53.0" in (tmp_path / "paper.md").read_text()


def test_a_run_that_is_still_writing_can_be_reported(
    tmp_path: Path, small_run: list[SampleRow]
) -> None:
    store(tmp_path, small_run)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"schema": 1, "ke')
    rows, run = read_results(tmp_path)
    assert rows == small_run
    assert run == {}


@pytest.mark.parametrize("content", ["", '{"schema'])
def test_no_results_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(UserError, match="no results yet"):
        write_report(tmp_path)


def test_a_folder_without_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"request": 3}', '{"request": {"samples": [1]}}'])
def test_a_broken_run_json(tmp_path: Path, small_run: list[SampleRow], content: str) -> None:
    store(tmp_path, small_run)
    (tmp_path / "run.json").write_text(content)
    if content in "{[]":
        with pytest.raises(UserError, match=r"run\.json"):
            write_report(tmp_path)
    else:  # JSON of somebody else's making: the tables don't need it
        assert len(write_report(tmp_path)) == 4


def test_an_unfinished_write_leaves_the_old_table(
    tmp_path: Path, small_run: list[SampleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, small_run)
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    store(tmp_path, small_run[:1])
    before["samples.jsonl"] = (tmp_path / "samples.jsonl").read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipe_gets_plain_text(small_run: list[SampleRow]) -> None:
    stream = io.StringIO()
    print_summary(small_run, RUN, stream)
    text = stream.getvalue()
    assert text.isascii()
    lines = text.splitlines()
    assert lines[1] == "tiny, quantized_prefill, toys: accuracy in percent"
    assert lines[3].split() == ["Method", "Bits", "OE", "ST", "SU", "Mean", "Cache", "bytes"]
    assert lines[5].split()[:5] == ["FP16", "16.00", "75.0", "75.0", "-"]


def test_a_terminal_gets_the_same_cells(
    small_run: list[SampleRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_summary([*small_run], RUN, stream)
    line = next(line for line in stream.getvalue().splitlines() if "KIVI" in line)
    assert line.split() == ["KIVI", "2.50", "50.0", "(n=2)", "-", "-", "50.0", "(1", "of", "3",
                            "tasks)", "1,000"]  # fmt: skip


def test_names_are_not_taken_for_terminal_markup(
    make_rows: Callable[..., list[SampleRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    print_summary(make_rows("akvq_vl[red]", "oe", "+", model="m[bold]\x1b[2J"), None, stream)
    assert "AKVQ-VL [red]" in stream.getvalue()
    assert "m[bold] [2J" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
