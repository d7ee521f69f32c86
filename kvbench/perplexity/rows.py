"""The result of one window: one typed row, one JSON line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from kvbench.errors import UserError
from kvbench.evaluation.lines import Kind
from kvbench.evaluation.typed import check_types, fields_of, to_line

SCHEMA = 1
ROWS = "perplexity.jsonl"


@dataclass(frozen=True)
class Identity:
    """Everything that could change a row."""

    model: str
    revision: str
    dtype: str
    method: str
    """Canonical spec."""
    protocol: str
    text: str
    text_sha256: str
    window: int
    """Tokens that the cache holds in the end."""
    context: int
    """Of them, tokens that the model reads at once; it reads the others one by one."""
    number: int
    """Place of the window in the text."""
    tokens_sha256: str
    """Of the window's token ids as JSON."""
    calibration: str
    """Fingerprint of the statistics the method was built with; empty without."""
    batch: int
    """Windows that are read together."""
    version: str
    """kvbench's."""

    def row_key(self) -> str:
        """SHA-256 (hex) over all fields."""
        identity = {f.name: getattr(self, f.name) for f in fields(Identity)} | {"schema": SCHEMA}
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Scores:
    """A method on one window, against the 16-bit cache at the same positions.

    Attributes:
        nll: Negative log-probability of the true next token at each position, nats.
        kl: KL(16-bit || method) at each position over the whole vocabulary, nats.
        agreeing: Positions at which both caches' most probable token is the same.
        delta_p_squared: Mean square of the change of the true next token's probability.
    """

    nll: list[float]
    kl: list[float]
    agreeing: int
    delta_p_squared: float


@dataclass(frozen=True, kw_only=True)
class PerplexityRow(Identity):
    """A method on one window. Status ``ok`` comes with scores, ``oom`` and ``error`` with a reason.

    Raises:
        UserError: A field has the wrong type, or scores and status exclude each other.
    """

    schema: int
    key: str
    storage: Literal["packed", "simulated", "foreign"]
    quantizes: bool
    """False for the 16-bit cache, which has nothing packed to read."""
    status: Literal["ok", "oom", "error"]
    error: str | None
    nll: list[float] | None
    """This and the next three as in `Scores`."""
    kl: list[float] | None
    agreeing: int | None
    delta_p_squared: float | None
    cache_bytes: int | None
    """With all tokens of the window stored; so are the bits."""
    bits_per_element: float | None
    packed_tokens_read: int | None
    """Tokens that attention read from packed segments, over layers and steps; None for another
    library's cache, which doesn't count."""
    seconds: float
    """A window's share of its batch."""

    def __post_init__(self) -> None:
        """Check every field's type, then that scores and status go together."""
        check_types(self)
        scores = (self.nll, self.kl, self.agreeing, self.delta_p_squared)
        complete = all(score is not None for score in scores) and self.error is None
        if complete != (self.status == "ok") or (self.status != "ok" and self.error is None):
            raise UserError(
                f"perplexity row: status {self.status} doesn't go with its scores and error text"
            )

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the newline."""
        return to_line(self)


def make_row(identity: Identity, scores: Scores | None, **values: object) -> PerplexityRow:
    """A row of an identity; without scores, `values` say what went wrong."""
    empty = dict.fromkeys((f.name for f in fields(Scores)), None)
    found = {**empty, "cache_bytes": None, "bits_per_element": None, "packed_tokens_read": None}
    found |= {"schema": SCHEMA, "key": identity.row_key(), "seconds": 0.0}
    found |= {"status": "ok", "error": None} | (asdict(scores) if scores else {})
    return PerplexityRow(**asdict(identity), **{**found, **values})  # type: ignore[arg-type]


def _parse(line: str) -> PerplexityRow:
    return PerplexityRow(**fields_of(line, PerplexityRow, SCHEMA))


KIND: Kind[PerplexityRow] = Kind(ROWS, "windows", _parse)


def read_perplexity(directory: Path) -> list[PerplexityRow]:
    """The rows of an output folder.

    Raises:
        UserError: The file can't be read, or a line is broken.
    """
    return KIND.read(directory / ROWS)
