"""Append-only store of result rows: killed anywhere and opened again, it lacks nothing finished."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from kvbench.errors import UserError
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.rows import SampleRow

SAMPLES = "samples.jsonl"
RUN = "run.json"
_LOCK = "samples.lock"
_SYNC_SECONDS = 1.0


class Store:
    """One output folder, held by one process at a time.

    ``samples.jsonl`` has one `SampleRow` a line. A row counts once it ends in a newline; a torn
    last line is cut off when the folder is opened. Rows with status ``oom`` or ``error`` from an
    earlier run count as missing, so they're tried again.

    Example:
        with Store(Path("out")) as store:
            if not store.has(key):
                store.append(row)
    """

    def __init__(self, directory: Path) -> None:
        """Remember the folder. Nothing is read, made or locked before ``with``."""
        self.directory = Path(directory)
        self._rows: dict[str, SampleRow] = {}
        self._retry: set[str] = set()
        self._file = -1
        self._synced = 0.0
        self._lock = FileLock(self.directory / _LOCK, timeout=0, thread_local=False)

    def __enter__(self) -> Store:
        """Make the folder, lock it, read its rows and cut off a torn last line.

        Raises:
            UserError: Another process holds the folder, it can't be written to, or a row is broken.
        """
        path = self.directory / SAMPLES
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._load(path)
        except OSError as error:
            self.close()
            raise UserError(
                f"can't use {self.directory} for results ({error.strerror or error}): "
                "choose another folder"
            ) from error
        except UserError:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file and let the folder go."""
        self.close()

    def close(self) -> None:
        """Push what was written to the disk and release the lock. Harmless when already closed.

        Raises:
            UserError: The disk refuses what the system had accepted before.
        """
        file, self._file = self._file, -1
        try:
            if file >= 0:
                os.fsync(file)
        except OSError as error:
            raise UserError(
                f"the disk lost rows of {self.directory / SAMPLES} ({error.strerror or error}): "
                "check the disk and start again"
            ) from error
        finally:
            if file >= 0:
                os.close(file)
            self._lock.release()

    def has(self, key: str) -> bool:
        """Say whether the sample needs no run: it has an answer, or this very run tried it."""
        return key in self._rows and key not in self._retry

    def rows(self) -> list[SampleRow]:
        """Return one row a key: the first with an answer, else the latest try."""
        return list(self._rows.values())

    def append(self, row: SampleRow) -> bool:
        """Write a row; returns once it is safe from the death of this process.

        Returns:
            False when the key already has an answer: the first one stays, and nothing is written.

        Raises:
            UserError: The disk is full or gone. Rows written before are unharmed.
        """
        if self._file < 0:
            raise RuntimeError("the store is not open: use it in a with statement")
        if _is_final(self._rows.get(row.key)):
            return False
        self._write(row.to_json().encode("utf-8") + b"\n")
        self._rows[row.key] = row
        self._retry.discard(row.key)
        return True

    def write_run(self, document: Mapping[str, Any]) -> None:
        """Write ``run.json`` atomically: the request, the environment, all that repeating it takes.

        Raises:
            UserError: The folder can't be written to.
        """
        text = json.dumps(document, indent=2, sort_keys=True, default=str)
        write_atomically(self.directory / RUN, text + "\n")

    def _acquire(self) -> None:
        path = self.directory / _LOCK
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.directory} is in use by {_holder(path)}: "
                "wait for it, or choose another output folder"
            ) from error
        path.write_text(f"{os.getpid()}\n", encoding="ascii")

    def _load(self, path: Path) -> None:
        content = path.read_bytes()
        rows, size = parse_rows(content, path)
        if size < len(content):
            warnings.warn(f"{path}: dropped a torn last line; its sample runs again", stacklevel=3)
            os.ftruncate(self._file, size)
        self._rows = distinct(rows)
        self._retry = {key for key, row in self._rows.items() if not _is_final(row)}

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted")
            if (
                time.monotonic() - self._synced > _SYNC_SECONDS
            ):  # the page cache survives our death, not a power cut
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):  # a torn line that stays is cut off at the next start
                os.ftruncate(self._file, size)
            raise UserError(
                f"can't write to {self.directory / SAMPLES} ({error.strerror or error}): the "
                f"{len(self._rows)} samples before are safe; free space and start again to continue"
            ) from error


def read_rows(path: Path) -> list[SampleRow]:
    """Read a ``samples.jsonl`` without locking it, as `Store.rows` would return it.

    A torn last line is skipped: its writer may be at work.

    Raises:
        UserError: The file can't be read, or a line is broken.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"can't read {path} ({error.strerror or error}): name a folder that kvbench eval wrote"
        ) from error
    return list(distinct(parse_rows(content, path)[0]).values())


def parse_rows(content: bytes, path: Path) -> tuple[list[SampleRow], int]:
    """Return all rows of a file's content, and how many bytes they take without a torn last line.

    Raises:
        UserError: A line before the last is no JSON, or any complete line isn't a valid row; with
        the line's number.
    """
    *lines, torn = content.split(b"\n")
    if lines and not torn and not _is_json(lines[-1]):
        torn = lines.pop() + b"\n"
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(SampleRow.from_json(line.decode("utf-8")))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return rows, len(content) - len(torn)


def distinct(rows: Iterable[SampleRow]) -> dict[str, SampleRow]:
    """Return one row a key: the first with an answer, else the latest without one."""
    kept: dict[str, SampleRow] = {}
    for row in rows:
        if not _is_final(kept.get(row.key)):
            kept[row.key] = row
    return kept


def _is_final(row: SampleRow | None) -> bool:
    return row is not None and row.status == "ok"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _holder(path: Path) -> str:
    try:
        pid = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        pid = ""
    return f"process {pid}" if pid.isdigit() else "another process"
