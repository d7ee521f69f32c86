"""The store loses no complete row, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.store import Store, read_rows

MakeRow = Callable[..., SampleRow]

OPENER = """
import sys
from pathlib import Path
from kvbench.errors import UserError
from kvbench.evaluation.store import Store
try:
    with Store(Path(sys.argv[1])):
        print("opened")
except UserError as error:
    print(error)
"""


def lines(*rows: SampleRow) -> bytes:
    return b"".join(row.to_json().encode() + b"\n" for row in rows)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return tmp_path / "samples.jsonl"


def test_rows_are_there_at_the_next_start(tmp_path: Path, make_row: MakeRow) -> None:
    first, second = make_row(key="a"), make_row(key="b", answer="C", extracted="C")
    with Store(tmp_path / "new" / "folder") as store:
        assert store.append(first)
        assert store.append(second)
        assert store.has("a")
        assert not store.has("c")
    with Store(tmp_path / "new" / "folder") as store:
        assert store.rows() == [first, second]
        assert store.has("b")


@pytest.mark.parametrize(
    "tail",
    [b'{"schema": 1, "key"', b'{"schema": 1, "key"\n', b"\x00\x00\x00", b"\x00\x00\n", b"\xff\n"],
)
def test_a_torn_last_line_is_cut_off(
    tmp_path: Path, samples: Path, make_row: MakeRow, tail: bytes
) -> None:
    whole = lines(make_row(key="a"), make_row(key="b"))
    samples.write_bytes(whole + tail)
    assert [row.key for row in read_rows(samples)] == ["a", "b"]
    assert samples.read_bytes() == whole + tail
    with pytest.warns(UserWarning, match="torn last line"), Store(tmp_path) as store:
        store.append(make_row(key="c"))
    assert samples.read_bytes() == whole + lines(make_row(key="c"))


def test_a_row_without_its_newline_counts_as_torn(
    tmp_path: Path, samples: Path, make_row: MakeRow
) -> None:
    samples.write_bytes(lines(make_row(key="a"), make_row(key="b"))[:-1])
    with pytest.warns(UserWarning, match="torn"), Store(tmp_path) as store:
        assert not store.has("b")
        assert store.has("a")


@pytest.mark.parametrize("after", [b"whole", b"torn"])
def test_a_broken_line_in_the_middle_is_named(
    tmp_path: Path, samples: Path, make_row: MakeRow, after: bytes
) -> None:
    last = lines(make_row(key="b")) if after == b"whole" else b'{"torn'
    content = lines(make_row(key="a")) + b'{"schema": 1,\n' + last
    samples.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.jsonl, line 2: "), Store(tmp_path):
        pass
    with pytest.raises(UserError, match="line 2"):
        read_rows(samples)
    assert samples.read_bytes() == content


def test_a_complete_row_of_another_schema_is_never_dropped(
    tmp_path: Path, samples: Path, make_row: MakeRow
) -> None:
    samples.write_bytes(lines(make_row(key="a")) + b'{"schema": 2}\n')
    with pytest.raises(UserError, match=r"line 2: .*schema 2"), Store(tmp_path):
        pass


def test_the_first_answer_to_a_key_stays(tmp_path: Path, samples: Path, make_row: MakeRow) -> None:
    first, second = make_row(answer="A"), make_row(answer="B")
    samples.write_bytes(lines(first, second))
    with Store(tmp_path) as store:
        assert store.rows() == [first]
        assert not store.append(second)
    assert samples.read_bytes() == lines(first, second)


@pytest.mark.parametrize("status", ["oom", "error"])
def test_failed_samples_run_again_next_time(tmp_path: Path, make_row: MakeRow, status: str) -> None:
    failed, answered = make_row(status=status), make_row()
    with Store(tmp_path) as store:
        store.append(failed)
        assert store.has(failed.key), "not again in the same run"
    with Store(tmp_path) as store:
        assert not store.has(failed.key)
        assert store.rows() == [failed]
        store.append(answered)
        assert store.has(failed.key)
        assert store.rows() == [answered]
    assert read_rows(tmp_path / "samples.jsonl") == [answered]


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    def open_elsewhere() -> str:
        command = [sys.executable, "-c", OPENER, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with Store(tmp_path):
        for _ in range(2):  # a refused process must not spoil the lock file for the next
            assert f"in use by process {os.getpid()}" in open_elsewhere()
        with pytest.raises(UserError, match="in use"), Store(tmp_path):
            pass
    assert open_elsewhere() == "opened\n"


def test_a_refused_folder_is_let_go(tmp_path: Path, samples: Path) -> None:
    samples.write_bytes(b"broken\n{}\n")
    refused = Store(tmp_path)  # kept: the lock must go by itself, not with the object
    with pytest.raises(UserError, match="line 1"), refused:
        pass
    samples.unlink()
    with Store(tmp_path) as store:
        assert store.rows() == []


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Set how many bytes a file may have; beyond them a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("missing", [1, 300, None], ids=["newline", "half", "all"])
def test_a_full_disk_costs_only_the_row_that_did_not_fit(
    tmp_path: Path,
    samples: Path,
    make_row: MakeRow,
    file_limit: Callable[[int], None],
    missing: int | None,
) -> None:
    kept, third = [make_row(key="a"), make_row(key="b")], make_row(key="c")
    lost = len(lines(third)) if missing is None else missing
    with Store(tmp_path) as store:
        for row in kept:
            store.append(row)
        file_limit(len(lines(*kept, third)) - lost)
        with pytest.raises(UserError, match="2 samples before are safe"):
            store.append(third)
        assert samples.read_bytes() == lines(*kept)
        assert not store.has("c")
        file_limit(1 << 20)
        assert store.append(third)
    assert read_rows(samples) == [*kept, third]


def test_a_torn_row_that_could_not_be_taken_back_spoils_no_other(
    tmp_path: Path,
    samples: Path,
    make_row: MakeRow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fails in the middle of a row and while it is cut off; later it works again."""
    write = os.write

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with Store(tmp_path) as store:
        store.append(make_row(key="a"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, line: write(file, line[:100]))
            patch.setattr(os, "ftruncate", refuse)
            with pytest.raises(UserError, match="free space and start again to continue"):
                store.append(make_row(key="b"))
            assert [row.key for row in read_rows(samples)] == ["a"]
        assert store.append(make_row(key="b"))
    assert samples.read_bytes() == lines(make_row(key="a"), make_row(key="b"))


def test_a_disk_that_fails_at_the_end_is_told_of(
    tmp_path: Path, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        raise OSError(28, "No space left on device")

    store = Store(tmp_path)
    with store:
        store.append(make_row(key="a"))
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(UserError, match="check the disk and start again"):
            store.close()
    monkeypatch.undo()
    with Store(tmp_path) as store:  # and the lock is free
        assert store.has("a")


def test_no_room_for_the_lock_is_a_sentence(
    tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    file_limit(0)
    with pytest.raises(UserError, match=r"can't use .* for results .*choose another folder"):
        Store(tmp_path).__enter__()


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, make_row: MakeRow, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(2_000_000_000, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    rows = [make_row(key=str(number)) for number in range(5)]
    for stored in range(5):
        with Store(tmp_path) as store:
            assert store.rows() == rows[:stored]
            assert store.append(rows[stored])
            store.write_run({"row": stored})
        os.utime(tmp_path / "samples.jsonl", (3_000_000_000 - stored,) * 2)
        os.utime(tmp_path / "samples.lock", (3_000_000_000 - stored,) * 2)
    assert read_rows(tmp_path / "samples.jsonl") == rows
    assert json.loads((tmp_path / "run.json").read_text()) == {"row": 4}


def test_an_impossible_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="choose another folder"), Store(tmp_path / "file" / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="choose another folder"), Store(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_missing_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        read_rows(tmp_path / "samples.jsonl")


def test_a_closed_store_takes_no_rows(tmp_path: Path, make_row: MakeRow) -> None:
    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="not open"):
        store.append(make_row())
    with store:
        pass
    store.close()


def test_run_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path) as store:
        store.write_run({"request": {"out": Path("x"), "limit": 2}})
        store.write_run({"request": {"out": Path("y"), "limit": 3}})
        monkeypatch.setattr(os, "replace", refuse)
        with pytest.raises(UserError, match="No space left"):
            store.write_run({"request": {}})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run == {"request": {"out": "y", "limit": 3}}
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "samples.jsonl",
        "samples.lock",
    }
