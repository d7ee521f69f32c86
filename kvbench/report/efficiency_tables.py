"""Table IV, the memory split and the speed of decode steps: Markdown, CSV and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, fields
from typing import TYPE_CHECKING

from tabulate import tabulate

from kvbench.report.efficiency import (
    BASES,
    SETTING_COLUMNS,
    EfficiencyBlock,
    Entry,
    efficiency_blocks,
    kept,
    measure,
    over,
    peak,
    ratio,
)
from kvbench.report.header import PROTOCOLS
from kvbench.report.text import (
    MISSING,
    amount,
    code,
    csv_text,
    escape,
    markdown_table,
    number,
    plain,
    several,
)

if TYPE_CHECKING:
    from kvbench.efficiency.rows import EfficiencyRow

_GIB = 1 << 30
_LEAST, _MOST = "\N{GREATER-THAN OR EQUAL TO}", "\N{LESS-THAN OR EQUAL TO}"
NOTES = """\
Batch: the largest that completes, or the one asked for; `OOM`: not even one row fits. Memory: peak
of the process by the driver, CUDA context included (by torch's allocator where the driver gives
none). Tokens/s: answer tokens of all rows over the whole run, prompts included; Decode: the same
without prompts and first tokens. TTFT: until every row has its first token. TPOT: time of a decode
step. Cache: allocated for keys and values, exact. Ratios are to FP16 in kvbench's own engine, and
to plain `generate` of transformers with its DynamicCache, at the same batch or each at its largest.
Path: `graph`, a captured decode step; `eager`, with the reason; `generate`, transformers' own loop;
`bound`, nothing ran: no implementation can be faster. Floor of a decode step: the larger of weight
bytes over copy bandwidth and FLOPs over matrix rate, plus cache bytes over copy bandwidth, both
rates measured in the same process."""

Column = tuple[str, Callable[[Entry], str]]


def _gib(value: float | None) -> str:
    return MISSING if value is None else f"{value / _GIB:.2f}"


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def _decimals(digits: int, factor: float = 1.0) -> Callable[[float | None], str]:
    return lambda value: MISSING if value is None else f"{factor * value:,.{digits}f}"


_milliseconds, _seconds = _decimals(2, 1e3), _decimals(2)


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.0f} %"


def _figure(name: str, show: Callable[[float | None], str]) -> Callable[[Entry], str]:
    return lambda entry: show(measure(entry.row, name))


def _speed(name: str, show: Callable[[float | None], str], sign: str) -> Callable[[Entry], str]:
    """A rate or a time; of a modelled row it is a bound, and has the sign of one."""

    def cell(entry: Entry) -> str:
        text = show(measure(entry.row, name))
        return f"{sign} {text}" if entry.modelled and text != MISSING else text

    return cell


def _over(name: str, baseline: str) -> Callable[[Entry], str]:
    return lambda entry: _times(over(entry, name, baseline))


def _batch(entry: Entry) -> str:
    if entry.ran:
        return str(entry.row.batch)
    status = "OOM" if entry.row.status == "oom" else entry.row.status
    return status if entry.row.fixed_batch is None else f"{entry.row.fixed_batch}: {status}"


MAIN: tuple[Column, ...] = (
    ("Batch", _batch),
    ("Memory GiB", lambda entry: _gib(peak(entry.row))),
    ("Tokens/s", _speed("throughput", amount, _MOST)),
    ("Decode tokens/s", _speed("decode_throughput", amount, _MOST)),
    ("TTFT s", _speed("ttft_s", _seconds, _LEAST)),
    ("TPOT ms", _speed("tpot_median_s", _milliseconds, _LEAST)),
    ("p95 ms", _speed("tpot_p95_s", _milliseconds, _LEAST)),
    ("Cache GiB", _figure("cache_bytes", _gib)),
)
BASIS: tuple[Column, ...] = (
    ("Basis", lambda entry: entry.row.memory),
    ("Weights", lambda entry: entry.row.weights if entry.ran else MISSING),
    ("Path", lambda entry: entry.row.path.partition(":")[0] or MISSING),
)
LARGEST: tuple[Column, ...] = (
    ("Batch, of FP16", _over("batch", "fp16")),
    ("Tokens/s, of FP16", _over("throughput", "fp16")),
    ("Decode, of FP16", _over("decode_throughput", "fp16")),
    ("Batch, of generate", _over("batch", "generate")),
    ("Tokens/s, of generate", _over("throughput", "generate")),
)
FIXED: tuple[Column, ...] = (
    ("FP16's memory over it", lambda e: _times(ratio(peak(e.fp16), peak(e.row)))),
    ("FP16's cache and workspace over it", lambda e: _times(ratio(kept(e.fp16), kept(e.row)))),
    *LARGEST[1:3],
    *LARGEST[4:],
)
SPLIT: tuple[Column, ...] = (
    ("Batch", _batch),
    ("Weights", _figure("weight_bytes", _gib)),
    ("Vision", _figure("vision_bytes", _gib)),
    ("Activations", _figure("activation_bytes", _gib)),
    ("Cache", _figure("cache_bytes", _gib)),
    ("Workspace", _figure("workspace_bytes", _gib)),
    ("Peak, torch", _figure("peak_torch", _gib)),
    ("Peak, driver", _figure("peak_nvml", _gib)),
)
STEP: tuple[Column, ...] = (
    ("Batch", _batch),
    ("Step ms", _figure("tpot_median_s", _milliseconds)),
    ("Floor ms", _figure("floor_s", _milliseconds)),
    ("Step over floor", _figure("over_floor", _times)),
    ("Read GB/s", _figure("achieved_bandwidth", _decimals(0, 1e-9))),
    ("Of copy bandwidth", _figure("bandwidth_share", _share)),
)
PAPER: tuple[Column, ...] = (
    ("Batch", _batch),
    ("Paper's batch", lambda e: str(e.paper.batch) if e.paper else MISSING),
    ("Memory GiB", lambda e: _gib(peak(e.row))),
    ("Paper's GB", lambda e: f"{e.paper.memory_gb:.2f}" if e.paper else MISSING),
    ("Tokens/s", _speed("throughput", amount, _MOST)),
    ("Paper's tokens/s", lambda e: f"{e.paper.throughput:,.2f}" if e.paper else MISSING),
)


def table4_markdown(rows: Iterable[EfficiencyRow]) -> str:
    """Return ``table4.md``: largest batches, equal batches, memory split and decode steps."""
    parts = ["# Memory, batch and throughput"]
    for block in efficiency_blocks(rows):
        parts.append(_header(block))
        if block.largest:
            parts.append(_table("Largest batch", block.largest, BASIS + MAIN + LARGEST))
        if any(entry.paper for entry in block.largest):
            theirs = [entry for entry in block.largest if entry.paper]
            parts.append(_table("Beside the paper's Table IV", theirs, PAPER))
        if block.fixed:
            parts.append(_table("Equal batches", block.fixed, BASIS + MAIN + FIXED))
        parts.append(_table("Memory in GiB", block.entries, SPLIT))
        if any(measure(entry.row, "floor_s") for entry in block.entries):
            parts.append(_table("Decode step", block.entries, STEP))
        parts += _remarks(block)
    return "\n\n".join([*parts, NOTES]) + "\n"


def efficiency_text(rows: Iterable[EfficiencyRow]) -> str:
    """Return the main table of every block as plain text."""
    parts = []
    for block in efficiency_blocks(rows):
        columns = (BASIS[2], *MAIN, LARGEST[1])
        headers = ["Method", *(title for title, _ in columns)]
        lines = [
            [plain(entry.name), *(plain(show(entry)) for _, show in columns)]
            for entry in block.entries
        ]
        align = ["left"] * 2 + ["right"] * (len(headers) - 2)
        table = tabulate(lines, headers, "simple", disable_numparse=True, colalign=align)
        parts.append(f"\n{plain(_title(block))}\n\n{table}\n")
    return "".join(parts)


def table4_csv(rows: Iterable[EfficiencyRow]) -> str:
    """Return ``table4.csv``: a line for each row, its figures as they are, and the ratios.

    Bytes, seconds and tokens a second; the times of single steps stay in the rows.
    """
    from kvbench.efficiency.rows import EfficiencyRow

    skipped = {*SETTING_COLUMNS, "tpot_s", "versions", "label", "schema", "key"}
    names = [field.name for field in fields(EfficiencyRow) if field.name not in skipped]
    entries = [(b.setting, entry) for b in efficiency_blocks(rows) for entry in b.entries]
    headers = [*SETTING_COLUMNS, *names, *(title for title, _ in RATIOS)]
    return csv_text(
        headers,
        [
            [_cell(value) for value in astuple(setting)]
            + [_cell(getattr(entry.row, name)) for name in names]
            + [number(show(entry)) for _, show in RATIOS]
            for setting, entry in entries
        ],
    )


def _ratio_of(name: str, baseline: str) -> Callable[[Entry], float | None]:
    return lambda entry: over(entry, name, baseline)


RATIOS: tuple[tuple[str, Callable[[Entry], float | None]], ...] = (
    ("batch_over_fp16", _ratio_of("batch", "fp16")),
    ("throughput_over_fp16", _ratio_of("throughput", "fp16")),
    ("decode_throughput_over_fp16", _ratio_of("decode_throughput", "fp16")),
    ("fp16_memory_over_this", lambda e: ratio(peak(e.fp16), peak(e.row))),
    ("fp16_cache_and_workspace_over_this", lambda e: ratio(kept(e.fp16), kept(e.row))),
    ("batch_over_generate", _ratio_of("batch", "generate")),
    ("throughput_over_generate", _ratio_of("throughput", "generate")),
    ("paper_batch", lambda e: e.paper.batch if e.paper else None),
    ("paper_memory_gb", lambda e: e.paper.memory_gb if e.paper else None),
    ("paper_throughput", lambda e: e.paper.throughput if e.paper else None),
)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


def _title(block: EfficiencyBlock) -> str:
    setting = block.setting
    tokens = f"{setting.input_tokens} tokens in, {setting.output_tokens} out"
    return f"{setting.model_label}, {setting.gpu_label} ({setting.memory}), {tokens}"


def _header(block: EfficiencyBlock) -> str:
    setting, rows = block.setting, [entry.row for entry in block.entries]
    limit = "all that it has" if setting.memory_limit is None else _gib(setting.memory_limit)
    tokens = f"{setting.input_tokens} in, {setting.vision_tokens} of them vision"
    installed = {pair for row in rows for pair in row.versions.items() if pair[1] is not None}
    facts = {
        "card": f"{setting.gpu_label}, {BASES[setting.memory]}",
        "memory limit in GiB": limit,
        "computed on": setting.device or "no card",
        "model": f"{setting.model}, weights {setting.revision or MISSING}, {setting.dtype}",
        "tokens": f"{tokens}, {setting.output_tokens} out; made-up prompts, greedy",
        "protocol": f"{setting.protocol}: {PROTOCOLS[setting.protocol]}",
        "prompts run together": f"{setting.prefill_rows} (all of a batch under generate and eager)",
        "seed": str(setting.seed),
        "versions": several(f"{name} {version}" for name, version in sorted(installed)),
        "machine": several(sorted({row.machine for row in rows})),
    }
    lines = [f"## {escape(_title(block))}", ""]
    lines += [f"- {name}: {escape(text)}" for name, text in facts.items()]
    lines += [f"- command: {code(command)}" for command in sorted({row.command for row in rows})]
    return "\n".join(lines)


def _table(title: str, entries: Sequence[Entry], columns: Sequence[Column]) -> str:
    headers = ["Method", *(name for name, _ in columns)]
    lines = [[entry.name, *(show(entry) for _, show in columns)] for entry in entries]
    texts = 1 + len(BASIS) if tuple(columns[: len(BASIS)]) == BASIS else 1
    return f"### {title}\n\n{markdown_table(headers, lines, texts)}"


def _remarks(block: EfficiencyBlock) -> list[str]:
    """Why rows have no figures, or no captured step."""
    said = {
        f"- {escape(entry.name)}: {escape(_remark(entry))}": None
        for entry in block.entries
        if _remark(entry)
    }
    return ["\n".join(said)] if said else []


def _remark(entry: Entry) -> str:
    row = entry.row
    if entry.ran:
        return row.path if ":" in row.path else ""
    return f"{_batch(entry)}; {row.detail}" if row.detail else _batch(entry)
