"""What a measurement leaves behind: one typed row, one JSON line; and one line for every try."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, Literal, TypeVar

from kvbench.cache.contract import Protocols
from kvbench.efficiency.request import Runner, TrialResult, with_tuples
from kvbench.efficiency.workload import Workload
from kvbench.evaluation.lines import Kind
from kvbench.evaluation.typed import check_types, fields_of, to_line

SCHEMA = 2
ROWS = "efficiency.jsonl"
TRIES = "tries.jsonl"
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}

Memory = Literal["measured", "emulated", "modelled"]
"""On the card itself; on another one held to its memory; by the capacity model."""


@dataclass(frozen=True)
class Setting:
    """Everything that could change a row. Memory in bytes."""

    model: str
    model_label: str
    revision: str
    """Of the weights; "random" where there are none."""
    method: str
    """Canonical spec."""
    label: str
    """The method's name in tables."""
    runner: Runner
    protocol: Protocols
    dtype: str
    input_tokens: int
    vision_tokens: int
    output_tokens: int
    fixed_batch: int | None
    """The batch that was asked for; None: the largest that completes."""
    prefill_rows: int
    seed: int
    gpu: str
    """Profile."""
    gpu_label: str
    memory: Memory
    memory_limit: int | None
    """Of the whole process; None: all that the card has."""
    device: str
    """The card that computed; empty where none did."""
    code: str
    """Fingerprint of the code that was measured."""
    versions: dict[str, Any]

    @property
    def searched(self) -> bool:
        """Whether the batch is the largest that completes."""
        return self.fixed_batch is None

    def workload(self, batch: int = 1) -> Workload:
        """This setting's tokens in so many rows."""
        return Workload(self.input_tokens, self.vision_tokens, self.output_tokens, batch)

    def row_key(self) -> str:
        """SHA-256 (hex) over all fields."""
        return fingerprint({"schema": SCHEMA, **asdict(self)})

    @property
    def place(self) -> tuple[object, ...]:
        """What tells a row from others in a table; a later row with the same takes its place."""
        skipped = {"code", "versions", "model_label", "label", "gpu_label"}
        return tuple(getattr(self, f.name) for f in fields(Setting) if f.name not in skipped)


@dataclass(frozen=True, kw_only=True)
class EfficiencyRow(TrialResult, Setting):
    """What one method took and gave on one model, workload and card.

    It has all of the setting and all of the try that was measured in full. Bytes, seconds, tokens a
    second; None where it can't be had. With status ``oom`` not even one row fits.

    Raises:
        UserError: A field has the wrong type or isn't finite.
    """

    schema: int
    key: str
    batch: int
    """Rows that the figures hold for; of a search, the largest that completes. 0: none does."""
    out_of_memory_at: int | None
    """The smallest batch that ran out of memory; None where none was tried."""
    tries: int
    throughput: float | None
    """Answer tokens of all rows a second, prefill included."""
    decode_throughput: float | None
    tpot_median_s: float | None
    tpot_p95_s: float | None
    achieved_bandwidth: float | None
    """Bytes that a decode step must read over its time, both means."""
    bandwidth_share: float | None
    """Of the copy bandwidth measured in the same process."""
    floor_s: float | None
    """`step_floor`."""
    over_floor: float | None
    """Mean decode step over its floor."""
    machine: str
    command: str
    time: str
    """When it was written: ISO 8601, UTC."""

    def __post_init__(self) -> None:
        """Check every field's type."""
        check_types(self)

    def to_json(self) -> str:
        """Return the row as one line of JSON, without the newline."""
        return to_line(self)


@dataclass(frozen=True, kw_only=True)
class TryRow(TrialResult):
    """One try of a search, kept so that an interrupted one needn't repeat it."""

    schema: int
    key: str
    request: dict[str, Any]
    seconds: float

    def __post_init__(self) -> None:
        """Check every field's type."""
        check_types(self)

    def to_json(self) -> str:
        """Return the try as one line of JSON, without the newline."""
        return to_line(self)


R = TypeVar("R", EfficiencyRow, TryRow)


def _parser(row: type[R]) -> Any:
    def parse(line: str) -> R:
        return row(**with_tuples(fields_of(line, row, SCHEMA, _renewed)))

    return parse


def _renewed(data: dict[str, Any]) -> dict[str, Any]:
    """Values of schema 1 as of schema 2, which has micro-batches one by one; others as they are."""
    if data.get("schema") != 1:
        return data
    kept = {name: of for name, of in data.items() if name not in ("ttft_first_s", "prefill_s")}
    return {**kept, "schema": 2, "prompts_s": []}


ROW_KIND: Kind[EfficiencyRow] = Kind(ROWS, "rows", _parser(EfficiencyRow), ("ok", "oom"))
TRY_KIND: Kind[TryRow] = Kind(TRIES, "tries", _parser(TryRow), ("ok", "oom"))


def make_row(
    setting: Setting,
    result: TrialResult,
    *,
    batch: int,
    out_of_memory_at: int | None,
    tries: int,
    machine: str,
    command: str,
    time: str,
) -> EfficiencyRow:
    """A row with all that follows from its setting and its full try of `batch` rows."""
    steps = result.tpot_s
    mean, floor = (fmean(steps) if steps else None), step_floor(result, batch, setting.dtype)
    achieved = _over(result.bytes_per_step, mean)
    return EfficiencyRow(
        **vars(setting),
        **{field.name: getattr(result, field.name) for field in fields(TrialResult)},
        schema=SCHEMA,
        key=setting.row_key(),
        batch=batch,
        out_of_memory_at=out_of_memory_at,
        tries=tries,
        throughput=_over(batch * setting.output_tokens, result.total_s),
        decode_throughput=_over(batch * (setting.output_tokens - 1), result.decode_s),
        tpot_median_s=median(steps) if steps else None,
        tpot_p95_s=_p95(steps) if steps else None,
        achieved_bandwidth=achieved,
        bandwidth_share=_over(achieved, result.copy_bandwidth),
        floor_s=floor,
        over_floor=_over(mean, floor),
        machine=machine,
        command=command,
        time=time,
    )


def step_floor(result: TrialResult, batch: int, dtype: str) -> float | None:
    """Seconds below which no decode step of this try could be, by what its process measured.

    The larger of weight bytes over copy bandwidth and FLOPs over matrix rate, plus cache bytes over
    copy bandwidth. A weight is read once a step and takes two FLOPs a row; cache bytes are all else
    that a step reads.
    """
    if not result.bytes_per_step or not result.flops_per_step or not result.copy_bandwidth:
        return None
    weights = result.flops_per_step / (2 * batch) * _ITEMSIZE[dtype]
    compute = _over(result.flops_per_step, result.matmul_rate) or 0.0
    cache = max(result.bytes_per_step - weights, 0.0)
    return max(weights / result.copy_bandwidth, compute) + cache / result.copy_bandwidth


def latest(rows: Iterable[EfficiencyRow]) -> list[EfficiencyRow]:
    """The newest row of every place, in the order in which the places came first."""
    found: dict[tuple[object, ...], EfficiencyRow] = {}
    for row in rows:
        old = found.get(row.place)
        if old is None or row.time >= old.time:
            found[row.place] = row
    return list(found.values())


def read_efficiency(directory: Path) -> list[EfficiencyRow]:
    """The newest rows of an output folder.

    Raises:
        UserError: The file can't be read, or a line is broken.
    """
    return latest(ROW_KIND.read(directory / ROWS))


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _over(amount: float | None, by: float | None) -> float | None:
    return amount / by if amount is not None and by else None


def _p95(steps: tuple[float, ...]) -> float:
    return quantiles(steps, n=20, method="inclusive")[-1] if len(steps) > 1 else steps[0]
