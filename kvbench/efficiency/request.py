"""One try: what to run, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from kvbench.cache.contract import Protocols
from kvbench.efficiency.workload import Workload

Runner = Literal["engine", "generate"]
Status = Literal["ok", "oom", "failed", "timeout"]
PROBE_STEPS = 3
"""Decode steps that show how much memory all of them take."""


@dataclass(frozen=True)
class TrialRequest:
    """One model, one method, one batch."""

    model: str
    """Name in the zoo, or name=/folder."""
    method: str
    """Name and parameters of a method."""
    workload: Workload
    runner: Runner
    """kvbench's engine, or transformers' own `generate`."""
    protocol: Protocols = "exact_prefill"
    device: str = "cuda"
    dtype: str = "float16"
    memory_limit: int | None = None
    """Bytes that the process may take on the device, its context among them; None: all there are.
    """
    prefill_rows: int = 8
    """Rows of a prefill micro-batch."""
    probe: bool = False
    """Only find out whether it fits: one micro-batch stands in for all, a few steps for the rest.
    """
    steady: bool = False
    """Whether it has run out of memory if torch had to give cached memory back to the device and
    ask again while the clock ran: all work waits for that. Only of the static engine.
    """
    seed: int = 0

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrialRequest:
        """Read what `save` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "workload": Workload(**content["workload"])})


@dataclass(frozen=True)
class TrialResult:
    """What a try gave. Memory in bytes, times in seconds; None where there is nothing to say."""

    status: Status
    detail: str = ""
    """One sentence when the status is not ok."""
    weights: Literal["real", "random"] = "random"
    path: str = ""
    """"graph", "fused: why there is no graph", "eager: why" or "generate"."""
    peak_nvml: int | None = None
    """Of the process, from the driver."""
    nvml_source: str = ""
    peak_torch: int | None = None
    cache_bytes: int | None = None
    """Allocated for keys and values, to the byte."""
    weight_bytes: int | None = None
    """Language model, embeddings and head included."""
    vision_bytes: int | None = None
    """Vision tower and projector."""
    workspace_bytes: int | None = None
    """What the decode step keeps besides the cache."""
    activation_bytes: int | None = None
    """The rest of the allocator's peak: prefill activations."""
    prompts_s: tuple[float, ...] = ()
    """One a micro-batch of prompts, until its rows have their first tokens."""
    ttft_s: float | None = None
    """Until the first token of every row is there."""
    tpot_s: tuple[float, ...] = ()
    """One a decode step."""
    decode_s: float | None = None
    total_s: float | None = None
    bytes_per_step: float | None = None
    """What a mean decode step must read: weights and cache."""
    flops_per_step: float | None = None
    copy_bandwidth: float | None = None
    """Bytes a second of a large copy on the device in this process, read and written."""
    matmul_rate: float | None = None
    """FLOP/s of a large product in the model's dtype in this process."""
    packed_tokens_read: int | None = None
    """Tokens that attention took from below 16 bits, summed over layers, rows and steps."""

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrialResult:
        """Read what `save` wrote; unknown names are left out."""
        known = {field.name for field in fields(cls)}
        kept = {name: value for name, value in content.items() if name in known}
        return cls(**with_tuples(kept))


def with_tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    """A result's fields from JSON, which has lists for tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
