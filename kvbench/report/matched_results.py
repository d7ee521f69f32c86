"""What stands beside a setting in a table of matched bits, whatever it was measured on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar


class Results(ABC):
    """The results of all methods under the same conditions, by their canonical specs."""

    notes: ClassVar[str]
    """What the columns are."""
    headers: ClassVar[Sequence[str]]
    columns: ClassVar[Sequence[str]]
    """Of the CSV file, as `headers` of the table."""
    axis: ClassVar[str]
    """Of the figure."""
    scale: ClassVar[str] = "linear"

    @property
    @abstractmethod
    def conditions(self) -> Mapping[str, Any]:
        """What the results share, `model` and `protocol` among it."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Plain text."""

    @property
    @abstractmethod
    def header(self) -> str:
        """Markdown that says what these numbers are."""

    @property
    @abstractmethod
    def file(self) -> str:
        """What tells the figure from those of other conditions."""

    @abstractmethod
    def cells(self, method: str) -> list[str]:
        """A method's cells of the table."""

    @abstractmethod
    def values(self, method: str) -> list[str]:
        """The same for CSV."""

    @abstractmethod
    def loss(self, method: str) -> float:
        """Smallest for the best method, infinite without a result."""

    @abstractmethod
    def point(self, method: str) -> tuple[float | None, float] | None:
        """Stored bits, if known, and the height in the figure; None without a result."""

    @abstractmethod
    def exact(self) -> float | None:
        """Height of the 16-bit cache in the figure; None if it needs no line."""
