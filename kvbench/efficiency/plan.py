"""What would fit where: the capacity model's answers for models, methods, lengths and cards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tabulate import tabulate
from transformers import PreTrainedModel

from kvbench.efficiency.capacity import Capacity, Footprint, capacity
from kvbench.efficiency.profiles import PROFILES, GPUProfile
from kvbench.efficiency.request import TrialResult
from kvbench.efficiency.rows import EfficiencyRow, Setting, make_row
from kvbench.efficiency.scenario import Conditions, Scenario, setting
from kvbench.efficiency.shapes import empty_model
from kvbench.efficiency.workload import Workload
from kvbench.models.architectures import configuration
from kvbench.models.find import find_model
from kvbench.models.zoo import ModelEntry

_GIB = 1 << 30
_PLANNED = (1, 8, 64)
BOUND = "modelled: memory from shapes; times are lower bounds from the card's data sheet"


@dataclass(frozen=True)
class PlanLine:
    """One model, method and prompt length."""

    model: str
    method: str
    input_tokens: int
    output_tokens: int
    peaks: Mapping[int, Footprint]
    """By batch."""
    largest: Mapping[str, int]
    """By card: the most rows that fit, 0 if none does."""


def model_capacity(entry: ModelEntry, method: str, dtype: str = "float16") -> Capacity:
    """The capacity model of a method on a model of the zoo.

    Raises:
        UserError: The model's shapes are not known, or the method can't be modelled on it.
    """
    return capacity(_empty(entry, dtype), method, text_salient_layers=entry.tsa_layers)


def expected(scenarios: Sequence[Scenario], conditions: Conditions) -> str:
    """The capacity model's table for the scenarios: peaks at their batches, and largest batches.

    Raises:
        UserError: A scenario can't be run, or no model is known for its cache.
    """
    asked_for = conditions.target.profile
    cards = {card.name: card for card in (asked_for, *PROFILES.values())}.values()
    batches = sorted({each.batch for each in scenarios if each.batch is not None}) or _PLANNED
    lines: list[PlanLine] = []
    for scenario in scenarios:
        asked = setting(scenario, conditions)
        model = model_capacity(find_model(scenario.model), asked.method, asked.dtype)
        one = asked.workload()
        line = plan_line(asked.model, asked.method, model, one, asked.prefill_rows, batches, cards)
        if line not in lines:
            lines.append(line)
    return plan_table(lines)


def plan_line(
    model: str,
    method: str,
    capacity: Capacity,
    workload: Workload,
    prefill_rows: int,
    batches: Sequence[int],
    cards: Iterable[GPUProfile],
) -> PlanLine:
    """Peak memory of a workload by batch, and its largest batch by card."""
    one = replace(workload, batch=1)
    return PlanLine(
        model,
        method,
        one.input_tokens,
        one.output_tokens,
        {b: capacity.footprint(replace(one, batch=b), prefill_rows) for b in batches},
        {card.name: capacity.largest_batch(one, card.memory, prefill_rows) for card in cards},
    )


def plan_table(lines: Iterable[PlanLine]) -> str:
    """The lines as a plain-text table, memory in GiB with the driver's share included."""
    lines = list(lines)
    batches = list(dict.fromkeys(batch for line in lines for batch in line.peaks))
    cards = list(dict.fromkeys(card for line in lines for card in line.largest))
    headers = ["Model", "Method", "Input", "Output"]
    headers += [f"GiB at {batch}" for batch in batches] + [f"Rows on {card}" for card in cards]
    cells: list[list[Any]] = [
        [line.model, line.method, line.input_tokens, line.output_tokens]
        + [f"{line.peaks[batch].total / _GIB:.1f}" for batch in batches]
        + [line.largest[card] or "-" for card in cards]
        for line in lines
    ]
    alignment = ["left", "left"] + ["right"] * (len(headers) - 2)
    return tabulate(cells, headers, "simple", disable_numparse=True, colalign=alignment)


def modelled_row(
    asked: Setting,
    model: Capacity,
    card: GPUProfile,
    *,
    machine: str,
    command: str,
    time: str,
) -> EfficiencyRow:
    """The row of a setting without a run: what must fit, and what no implementation can beat.

    Its times are `step_bound` and `prefill_bound`; they are no measurements, and `detail` says so.
    """
    one = asked.workload()
    limit = asked.memory_limit or card.memory
    largest = model.largest_batch(one, limit, asked.prefill_rows)
    batch = largest if asked.fixed_batch is None else asked.fixed_batch
    fits = 0 < batch <= largest
    workload = replace(one, batch=max(batch, 1))
    return make_row(
        asked,
        _modelled(model, workload, asked.prefill_rows, card, fits),
        batch=batch if fits else 0,
        out_of_memory_at=largest + 1 if asked.fixed_batch is None or not fits else None,
        tries=0,
        machine=machine,
        command=command,
        time=time,
    )


def step_bound(model: Capacity, workload: Workload, card: GPUProfile) -> float | None:
    """Seconds that a mean decode step takes at the least; None if the card's rates aren't known.

    The larger of weight bytes over bandwidth and FLOPs over rate, plus the cache's bytes over
    bandwidth: those that are read and, for caches that are copied to grow, written.
    """
    if not card.bandwidth or not card.fp16_rate:
        return None
    flops = 2 * model.shape.linear_parameters * workload.batch
    weights = max(model.shape.linear_bytes / card.bandwidth, flops / card.fp16_rate)
    return weights + workload.batch * model.row(workload).moved / card.bandwidth


def prefill_bound(model: Capacity, workload: Workload, card: GPUProfile) -> float | None:
    """Seconds that all prompts' matrix products take at the least, attention's causal half too."""
    if not card.fp16_rate:
        return None
    shape, tokens = model.shape, workload.input_tokens
    head = shape.decoder.hidden * shape.decoder.vocabulary  # for one position only
    row = 2.0 * (tokens * (shape.linear_parameters - head) + head)
    row += 2.0 * shape.decoder.layers * shape.decoder.query * tokens**2
    if shape.tower is not None:
        patches = workload.vision_tokens * shape.tower.patches
        row += 2.0 * patches * shape.vision_bytes / shape.itemsize
    return workload.batch * row / card.fp16_rate


def _modelled(
    model: Capacity, workload: Workload, prefill_rows: int, card: GPUProfile, fits: bool
) -> TrialResult:
    peak = model.footprint(workload, prefill_rows)
    if not fits:
        need = f"{workload.batch} rows need {peak.total / _GIB:.1f} GiB by the capacity model"
        return TrialResult("oom", detail=need)
    step, prefill = step_bound(model, workload, card), prefill_bound(model, workload, card)
    decode = None if step is None else step * (workload.output_tokens - 1)
    return TrialResult(
        "ok",
        detail=BOUND,
        path="bound",
        peak_nvml=peak.total,
        peak_torch=peak.allocated,
        cache_bytes=peak.cache,
        weight_bytes=peak.weights,
        vision_bytes=peak.vision,
        workspace_bytes=peak.workspace,
        activation_bytes=peak.activations,
        ttft_s=prefill,
        decode_s=decode,
        total_s=None if prefill is None or decode is None else prefill + decode,
        tpot_s=() if step is None else (step,),
    )


@cache
def _empty(entry: ModelEntry, dtype: str) -> PreTrainedModel:
    return empty_model(configuration(entry), dtype)
