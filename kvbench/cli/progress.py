"""Progress of an evaluation on a terminal, or line by line in a log. Everything goes to stderr."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Terminal:
    """A bar with the time left, for use in a ``with`` statement; plain lines where none fits."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Terminal:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def begin(self, total: int, done: int) -> None:
        """Set the scale; samples of an earlier run count as done."""
        self._bar.update(self._task, total=total, completed=done)
        if done:
            self.note(f"{done} of {total} samples are there already")

    def cell(self, label: str) -> None:
        """Name the cell that begins."""
        self._bar.update(self._task, description=label)
        if not self._console.is_terminal:
            task = self._bar.tasks[self._task]
            self.note(f"{task.completed:.0f}/{task.total or 0:.0f} {label}")

    def advance(self) -> None:
        """Count one more sample."""
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)
