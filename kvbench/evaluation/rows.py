"""The result of one sample: one typed row, one JSON line."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError
from kvbench.evaluation.typed import check_types, fields_of, to_line

SCHEMA = 1
STORAGES = ("packed", "simulated", "foreign")
BOTH = ("quantized_prefill", "exact_prefill")
"""The protocols that every method can follow."""
PROTOCOLS = (*BOTH, "sparse_prefill")
STATUSES = ("ok", "oom", "error")

LM_EVAL = "lm_eval.json"
"""What ``kvbench lm-eval`` writes: lm-eval's results of each method, and its samples."""

_VERDICT = ("answer", "extracted", "correct", "strict", "empty", "unparsable")


@dataclass(frozen=True)
class SampleRow:
    """What one method answered to one sample, with everything needed to judge and to repeat it.

    A row with status ``ok`` has an answer and its verdict; one with ``oom`` (out of memory) or
    ``error`` has neither.

    Raises:
        UserError: A field has the wrong type or an impossible value. Numbers must be finite.
    """

    schema: int
    """Version of this layout."""
    key: str
    """`row_key` of the sample."""
    model: str
    revision: str
    dtype: str
    method: str
    """Canonical spec: the name, with the parameters that differ from the method's defaults."""
    storage: str
    """``packed``, ``simulated`` (no bytes may be claimed) or ``foreign`` (another library's
    cache)."""
    protocol: str
    dataset: str
    task: str
    task_version: int
    sample_id: int
    prompt_style: str
    prompt_sha256: str
    images_sha256: str
    generation: dict[str, Any]
    calibration: str
    """Fingerprint of the statistics the method was built with, and text-salient layers that aren't
    the zoo's own; empty without either."""
    batch: int
    """Rows generated together."""
    version: str
    """kvbench's version."""
    status: str
    error: str | None
    answer: str | None
    extracted: str | None
    correct: bool | None
    strict: bool | None
    empty: bool | None
    unparsable: bool | None
    images_kept: int
    images_total: int
    truncated: bool
    prompt_tokens: int
    generated_tokens: int
    cache_bytes: int | None
    bits_per_element: float | None
    packed_tokens_read: int | None
    """Tokens that attention read from packed segments; 0 for the 16-bit cache."""
    kl_first: float | None
    """KL(fp16 || method) at the first answer token, nats."""
    kl_mean: float | None
    """Mean of the same over the fp16 answer's tokens under teacher forcing, nats."""
    agrees: bool | None
    """Same answer text as fp16 of the same model, task and sample."""
    seconds: dict[str, float]

    def __post_init__(self) -> None:
        """Check every field's type, then the values that exclude each other."""
        check_types(self)
        _check_dicts(self)
        _check_values(self)

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the newline."""
        return to_line(self)

    @classmethod
    def from_json(cls, line: str) -> SampleRow:
        """Read a row back.

        Raises:
            UserError: The text is no JSON object, another schema's, or lacks, adds or mistypes a
            field.
        """
        return cls(**fields_of(line, cls, SCHEMA))


def row_key(
    *,
    model: str,
    revision: str,
    dtype: str,
    method: str,
    protocol: str,
    dataset: str,
    task: str,
    task_version: int,
    sample_id: int,
    prompt_style: str,
    prompt_sha256: str,
    images_sha256: str,
    generation: Mapping[str, Any],
    calibration: str,
    batch: int,
    version: str,
) -> str:
    """Return the SHA-256 (hex) over everything that could change a sample's answer.

    The arguments are the fields of `SampleRow` of the same names; the hash is taken of their
    canonical JSON (sorted keys, no blanks, ASCII), so the order in ``generation`` doesn't matter.
    """
    identity = {**locals(), "generation": dict(generation), "schema": SCHEMA}
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _check_dicts(row: SampleRow) -> None:
    if not all(isinstance(key, str) for key in (*row.generation, *row.seconds)):
        raise UserError("result row: generation and seconds must have texts as keys")
    for part, value in row.seconds.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise UserError(
                f"result row: seconds has {part}={value!r}, but must have finite numbers"
            )


def _check_values(row: SampleRow) -> None:
    for name, allowed in (("storage", STORAGES), ("protocol", PROTOCOLS), ("status", STATUSES)):
        value = getattr(row, name)
        if value not in allowed:
            raise UserError(f"result row: {name} is {value!r}, but must be one of {allowed}")
    if row.schema != SCHEMA:
        raise UserError(f"result row: schema is {row.schema}, but must be {SCHEMA}")
    if row.batch < 1:
        raise UserError(f"result row: batch is {row.batch}, but must be at least 1")
    given = [name for name in _VERDICT if getattr(row, name) is not None]
    if row.status == "ok" and (row.error is not None or len(given) < len(_VERDICT)):
        raise UserError(
            "result row: status ok needs an answer with its whole verdict, and no error"
        )
    if row.status != "ok" and (row.error is None or given):
        raise UserError(
            f"result row: status {row.status} needs an error text, and neither answer nor verdict"
        )
