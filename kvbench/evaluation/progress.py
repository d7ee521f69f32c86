"""How an evaluation tells where it is, whoever listens: a terminal, a log, nobody."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Listener of one evaluation. Calls come in this order: begin, then any of the others."""

    def begin(self, total: int, done: int) -> None:
        """The grid has `total` samples, of which `done` are in the store already."""

    def cell(self, label: str) -> None:
        """A cell of the grid begins, such as ``"smol_llava · kivi · oe"``."""

    def advance(self) -> None:
        """One more sample has its row."""

    def note(self, text: str) -> None:
        """Something the user should know: which data, which calibration, a sample that failed."""


class Silent:
    """A listener that says nothing."""

    def begin(self, total: int, done: int) -> None:
        """Say nothing."""

    def cell(self, label: str) -> None:
        """Say nothing."""

    def advance(self) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""
