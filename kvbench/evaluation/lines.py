"""Append-only files of JSON lines: killed anywhere, they lack nothing that was finished."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from filelock import FileLock, Timeout

from kvbench.errors import UserError

_SYNC_SECONDS = 1.0


class Row(Protocol):
    """A result that takes one line."""

    @property
    def key(self) -> str:
        """Tells it from all others."""

    @property
    def status(self) -> str:
        """How it ended."""

    def to_json(self) -> str:
        """Return one line of JSON, without the newline."""


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Kind(Generic[R]):
    """What a file holds.

    Attributes:
        name: The file's, ending in ``.jsonl``.
        what: What its rows are called in messages, such as ``"samples"``.
        parse: From a line to a row; `UserError` says what is wrong with the line.
        final: Statuses of rows that need no other try; the first such row of a key stays.
    """

    name: str
    what: str
    parse: Callable[[str], R]
    final: tuple[str, ...] = ("ok",)

    def is_final(self, row: R | None) -> bool:
        """Whether a row needs no other try."""
        return row is not None and row.status in self.final

    def distinct(self, rows: Iterable[R]) -> dict[str, R]:
        """Return one row a key: the first final one, else the latest try."""
        kept: dict[str, R] = {}
        for row in rows:
            if not self.is_final(kept.get(row.key)):
                kept[row.key] = row
        return kept

    def parse_all(self, content: bytes, path: Path) -> tuple[list[R], int]:
        """Return all rows of a file's content, and their bytes without a torn last line.

        Raises:
            UserError: A line before the last is no JSON, or any complete line isn't a valid row;
            with the line's number.
        """
        *lines, torn = content.split(b"\n")
        if lines and not torn and not _is_json(lines[-1]):
            torn = lines.pop() + b"\n"
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(self.parse(line.decode("utf-8")))
            except (UserError, UnicodeDecodeError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
        return rows, len(content) - len(torn)

    def read(self, path: Path) -> list[R]:
        """Read a file without locking it, as `Lines.rows` would return it.

        A torn last line is skipped: its writer may be at work.

        Raises:
            UserError: The file can't be read, or a line is broken.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"can't read {path} ({error.strerror or error}): name a folder that kvbench wrote"
            ) from error
        return list(self.distinct(self.parse_all(content, path)[0]).values())


class Lines(Generic[R]):
    """One file of rows in an output folder, held by one process at a time.

    A row counts once it ends in a newline; a torn last line is cut off when the folder is opened.
    Rows of an earlier run whose status isn't final count as missing, so they're tried again.

    Example:
        with Lines(Path("out"), kind) as lines:
            if not lines.has(key):
                lines.append(row)
    """

    def __init__(self, directory: Path, kind: Kind[R]) -> None:
        """Remember the folder. Nothing is read, made or locked before ``with``."""
        self.directory = Path(directory)
        self._kind = kind
        self._path = self.directory / kind.name
        self._places: dict[str, tuple[int, int]] = {}
        """Where the row of a key begins and ends; rows themselves would fill the memory."""
        self._open: set[str] = set()
        """Keys whose row isn't final."""
        self._retry: set[str] = set()
        """Those of them that an earlier run left."""
        self._file = -1
        self._size = 0
        self._synced = 0.0
        self._lock_path = self._path.with_suffix(".lock")
        self._lock = FileLock(self._lock_path, timeout=0, thread_local=False)

    def __enter__(self) -> Self:
        """Make the folder, lock it, read its rows and cut off a torn last line.

        Raises:
            UserError: Another process holds the folder, it can't be written to, or a row is broken.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._load()
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

    def __exit__(self, *error: object) -> None:
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
                f"the disk lost rows of {self._path} ({error.strerror or error}): "
                "check the disk and start again"
            ) from error
        finally:
            if file >= 0:
                os.close(file)
            self._lock.release()

    def has(self, key: str) -> bool:
        """Say whether a row is there that needs no other try, or that this very run wrote."""
        return key in self._places and key not in self._retry

    def get(self, key: str) -> R | None:
        """Return the row of a key for which `has` holds, None for others."""
        if not self.has(key):
            return None
        start, end = self._places[key]
        with self._path.open("rb") as file:
            file.seek(start)
            return self._kind.parse(file.read(end - start).decode("utf-8"))

    def rows(self) -> list[R]:
        """Return one row a key: the first final one, else the latest try."""
        if not self._places:
            return []
        content = self._path.read_bytes()
        lines = (content[start:end] for start, end in self._places.values())
        return [self._kind.parse(line.decode("utf-8")) for line in lines]

    def append(self, row: R) -> bool:
        """Write a row; returns once it is safe from the death of this process.

        Returns:
            False when the key has a final row already: it stays, and nothing is written.

        Raises:
            UserError: The disk is full or gone. Rows written before are unharmed.
        """
        if self._file < 0:
            raise RuntimeError("the store is not open: use it in a with statement")
        if row.key in self._places and row.key not in self._open:
            return False
        line = row.to_json().encode("utf-8") + b"\n"
        self._write(line)
        self._place(row, len(line))
        self._retry.discard(row.key)
        return True

    def _place(self, row: R, length: int) -> None:
        """Remember the next row of the file; it is the one of its key unless there is a final."""
        start, self._size = self._size, self._size + length
        if row.key in self._places and row.key not in self._open:
            return
        self._places[row.key] = start, self._size
        (self._open.discard if self._kind.is_final(row) else self._open.add)(row.key)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"{self.directory} is in use by {_holder(self._lock_path)}: "
                "wait for it, or choose another output folder"
            ) from error
        self._lock_path.write_text(f"{os.getpid()}\n", encoding="ascii")

    def _load(self) -> None:
        content = self._path.read_bytes()
        rows, size = self._kind.parse_all(content, self._path)
        if size < len(content):
            warnings.warn(f"{self._path}: dropped a torn last line; it is made again", stacklevel=3)
            os.ftruncate(self._file, size)
        self._size = 0
        self._places, self._open = {}, set()
        for row, line in zip(rows, content[:size].split(b"\n"), strict=False):
            self._place(row, len(line) + 1)
        self._retry = set(self._open)

    def _write(self, line: bytes) -> None:
        try:
            if os.fstat(self._file).st_size > self._size:  # a torn row that couldn't be taken back
                os.ftruncate(self._file, self._size)
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fitted")
            if (
                time.monotonic() - self._synced > _SYNC_SECONDS
            ):  # the page cache survives our death, not a power cut
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):  # a torn row that stays is cut off before the next one
                os.ftruncate(self._file, self._size)
            raise UserError(
                f"can't write to {self._path} ({error.strerror or error}): the {len(self._places)} "
                f"{self._kind.what} before are safe; free space and start again to continue"
            ) from error


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
