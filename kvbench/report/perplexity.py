"""Perplexity and divergence as tables, from the rows of ``kvbench perplexity``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.defaults import REFERENCE
from kvbench.evaluation.rows import PROTOCOLS
from kvbench.evaluation.statistics import Estimate, Interval, bootstrap_items, mean_of_items, tail
from kvbench.perplexity.rows import PerplexityRow
from kvbench.report import header
from kvbench.report.board import Leaderboard
from kvbench.report.paper import label, paper_table, rank
from kvbench.report.text import (
    MISSING,
    amount,
    code,
    csv_text,
    escape,
    estimate,
    markdown_table,
    number,
    percent,
)

NOTES = """\
KL(FP16 || method) in nats over the whole vocabulary, at every scored position, teacher-forced on
the text: mean over a window's positions, then over windows, with the standard error over windows;
the 99 % and 99.9 % quantiles are of all positions together (99.9 % from 10,000 positions on).
Top-1: positions at which the most probable token is FP16's. RMS Δp: root mean square change of the
true next token's probability. Perplexity: exp of the mean negative log-probability of the true
next tokens; Times FP16: on the same windows. Intervals are 95 %, by bootstrap over windows. FP16's
own row is a second pass held against the first: what it differs from zero is noise. Bits and bytes
are of the cache with a whole window in it. Packed tokens read: tokens that attention took from
quantized storage a window, over layers and steps."""

_ONE_PASS = (
    "each window is read in one pass in which every token attends to the cache as it is stored "
    "when the window is through; all positions are scored"
)

_HEADERS = (
    "Method", "Bits", "Cache bytes", "KL mean", "KL 99 %", "KL 99.9 %", "Top-1 %", "RMS Δp",
    "Perplexity", "Times FP16", "Windows", "Packed tokens read", "Seconds", "Flags",
)  # fmt: skip
_CSV_HEADERS = (
    "method", "windows", "expected", "positions", "bits_per_element", "cache_bytes", "kl_mean",
    "kl_mean_se", "kl_50", "kl_99", "kl_99_low", "kl_99_high", "kl_999", "worst_window", "top1",
    "rms_delta_p", "perplexity", "perplexity_low", "perplexity_high", "ratio", "ratio_low",
    "ratio_high", "packed_tokens_read", "seconds_a_window", "calibration", "storage", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What numbers must share to stand in one table."""

    model: str
    protocol: str
    text: str
    text_sha256: str
    revision: str
    dtype: str
    window: int
    context: int
    batch: int
    version: str


@dataclass(frozen=True)
class Line:
    """A method in a table. None where no window says anything."""

    method: str
    windows: int
    expected: int
    positions: int = 0
    bits: float | None = None
    cache_bytes: float | None = None
    kl: Estimate | None = None
    kl_interval: Interval | None = None
    tails: Mapping[float, float | None] | None = None
    tail_interval: Interval | None = None
    worst: int | None = None
    """Number of the window with the largest KL at a position."""
    top1: float | None = None
    delta_p: float | None = None
    perplexity: float | None = None
    interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    tokens_read: float | None = None
    seconds: float | None = None
    calibration: str = ""
    storage: str = ""
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class PerplexityTable:
    """Methods under one setting, in the paper's order."""

    setting: Setting
    lines: tuple[Line, ...]


def build_tables(rows: Iterable[PerplexityRow]) -> list[PerplexityTable]:
    """Group rows into tables. Their order does not matter."""
    groups: dict[Setting, dict[str, list[PerplexityRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        values = (getattr(row, field.name) for field in fields(Setting))
        groups[Setting(*values)][row.method].append(row)
    ordered = sorted(groups, key=lambda s: (s.model, PROTOCOLS.index(s.protocol), astuple(s)))
    return [_table(setting, groups[setting]) for setting in ordered]


def _table(setting: Setting, methods: Mapping[str, list[PerplexityRow]]) -> PerplexityTable:
    expected = len({row.number for rows in methods.values() for row in rows})
    known = paper_table().methods
    baseline = {row.number: row for row in methods.get(REFERENCE, []) if row.status == "ok"}
    lines = (
        _line(method, methods[method], baseline, expected)
        for method in sorted(methods, key=lambda method: rank(known, method))
    )
    return PerplexityTable(setting, tuple(lines))


def _line(
    method: str, rows: Sequence[PerplexityRow], baseline: Mapping[int, PerplexityRow], expected: int
) -> Line:
    failures = sorted({str(row.error) for row in rows if row.status != "ok"})
    if len({row.calibration for row in rows}) > 1:
        failures.append("mixed calibrations")
        rows = []
    scored = sorted((row for row in rows if row.status == "ok"), key=lambda row: row.number)
    empty = Line(method, len(scored), expected, failures=tuple(failures))
    if not scored:
        return empty
    nll, kl = ([np.array(getattr(row, name)) for row in scored] for name in ("nll", "kl"))
    return Line(
        **{
            **vars(empty),
            "positions": sum(map(len, kl)),
            "bits": _mean(row.bits_per_element for row in scored),
            "cache_bytes": _mean(row.cache_bytes for row in scored if row.storage == "packed"),
            "kl": mean_of_items(kl),
            "kl_interval": _of_means(kl, lambda x: float(x.mean())),
            "tails": tail(np.concatenate(kl)),
            "tail_interval": bootstrap_items(kl, lambda x: float(np.quantile(x, 0.99))),
            "worst": max(zip(map(np.max, kl), scored, strict=True), key=lambda p: p[0])[1].number,
            "top1": sum(row.agreeing or 0 for row in scored) / sum(map(len, kl)),
            "delta_p": math.sqrt(_mean(row.delta_p_squared for row in scored) or 0.0),
            "perplexity": _perplexity(np.concatenate(nll)),
            "interval": _interval(nll),
            "tokens_read": _mean(row.packed_tokens_read for row in scored),
            "seconds": _mean(row.seconds for row in scored),
            "calibration": scored[0].calibration,
            "storage": scored[0].storage,
            **_ratio(scored, baseline),
        }
    )


def _ratio(
    scored: Sequence[PerplexityRow], baseline: Mapping[int, PerplexityRow]
) -> dict[str, float | Interval | None]:
    """The method's perplexity over the baseline's on the same windows."""
    differences = [
        np.array(row.nll) - np.array(baseline[row.number].nll)
        for row in scored
        if row.number in baseline
    ]
    if not differences:
        return {}
    value = _perplexity(np.concatenate(differences))
    return {"ratio": value, "ratio_interval": _interval(differences)}


def _interval(windows: Sequence[NDArray[np.float64]]) -> Interval | None:
    return _of_means(windows, _perplexity)


def _of_means(
    windows: Sequence[NDArray[np.float64]], statistic: Callable[[NDArray[np.float64]], float]
) -> Interval | None:
    """Windows of a table have equally many positions, so their means will do."""
    return bootstrap_items([window.mean(keepdims=True) for window in windows], statistic)


def _perplexity(nll: NDArray[np.float64]) -> float:
    return float(np.exp(nll.mean()))


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return math.fsum(given) / len(given) if given else None


def perplexity_markdown(
    tables: Sequence[PerplexityTable], run: Mapping[str, Any] | None = None
) -> str:
    """Return ``perplexity.md``.

    Args:
        tables: From `build_tables`.
        run: Content of ``run.json``.
    """
    parts = ["# Perplexity"]
    for table in tables:
        parts += [table_header(table, run or {}), _grid(table)]
    return "\n\n".join([*parts, NOTES]) + "\n"


def perplexity_text(table: PerplexityTable) -> str:
    """Return a table with its title for the terminal."""
    return f"\n{table_title(table.setting)}\n\n{_grid(table)}"


def perplexity_csv(tables: Sequence[PerplexityTable]) -> str:
    """Return ``perplexity.csv``: a line a method; shares in percent, KL in nats."""
    lines = [
        [*map(str, astuple(table.setting)), *_csv_line(line)]
        for table in tables
        for line in table.lines
    ]
    return csv_text([*(field.name for field in fields(Setting)), *_CSV_HEADERS], lines)


def table_title(setting: Setting) -> str:
    """Return a table's title as plain text: model, protocol, text and length."""
    return f"{setting.model}, {setting.protocol}, {setting.text}, T = {setting.window} tokens"


def table_header(table: PerplexityTable, run: Mapping[str, Any]) -> str:
    """Return a table's heading and settings in Markdown."""
    setting, board = table.setting, Leaderboard((), run)
    facts = {
        "protocol": f"{setting.protocol}: {_how(setting)}",
        "text": f"{setting.text}, SHA-256 {setting.text_sha256}",
        "windows": f"{max(line.windows for line in table.lines)} of T = {setting.window} tokens, "
        f"{setting.batch} read together",
        "calibration": _calibration(table),
        "model": f"{setting.model}, revision {setting.revision}, {setting.dtype}",
        "kvbench": setting.version,
    }
    lines = [f"## {escape(table_title(setting))}", ""]
    lines += [f"- {name}: {escape(text)}" for name, text in facts.items()]
    lines += [f"- machine: {escape(board.machine)}"] if board.machine else []
    lines += [f"- command: {code(board.command)}"] if board.command else []
    return "\n".join(lines)


def _how(setting: Setting) -> str:
    if setting.context == setting.window:
        return _ONE_PASS
    return (
        f"the first {setting.context} tokens of a window are a prompt ("
        f"{header.PROTOCOLS[setting.protocol]}); the others follow one by one, each attending to "
        "the cache as stored; what follows the prompt is scored"
    )


def _calibration(table: PerplexityTable) -> str:
    names = [line.method for line in table.lines if line.calibration]
    if not names:
        return "no method needed any"
    return (
        f"{', '.join(names)} on windows from the end of the same text, none of which is scored "
        "and none of whose tokens is in a scored window"
    )


def _grid(table: PerplexityTable) -> str:
    return markdown_table(_HEADERS, [_cells(line) for line in table.lines], 1)


def _cells(line: Line) -> list[str]:
    tails = line.tails or {}
    return [
        label(paper_table().methods, line.method),
        MISSING if line.bits is None else f"{line.bits:.2f}",
        amount(line.cache_bytes),
        estimate(line.kl),
        _digits(tails.get(0.99)),
        _digits(tails.get(0.999)),
        percent(line.top1),
        _digits(line.delta_p),
        ranged(line.perplexity, line.interval),
        ranged(line.ratio, line.ratio_interval),
        str(line.windows),
        amount(line.tokens_read),
        _digits(line.seconds),
        flags(line) or MISSING,
    ]


def _digits(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3g}"


def ranged(value: float | None, interval: Interval | None, digits: int = 4) -> str:
    """Return a number with its interval: ``1.043 [1.04, 1.046]``."""
    if value is None:
        return MISSING
    if interval is None:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}g} [{interval.low:.{digits}g}, {interval.high:.{digits}g}]"


def flags(line: Line) -> str:
    """Return why a line lacks windows; empty if it has all."""
    found = list(line.failures)
    if line.windows < line.expected:
        found.append(f"{line.windows} of {line.expected} windows")
    return "; ".join(found)


def _csv_line(line: Line) -> list[str]:
    tails, kl = line.tails or {}, line.kl
    ends = [
        (interval.low, interval.high) if interval else (None, None)
        for interval in (line.tail_interval, line.interval, line.ratio_interval)
    ]
    values = [
        *(line.bits, line.cache_bytes, kl.mean if kl else None, kl.standard_error if kl else None),
        *(tails.get(0.5), tails.get(0.99), *ends[0], tails.get(0.999), line.worst),
        *(None if line.top1 is None else 100 * line.top1, line.delta_p),
        *(line.perplexity, *ends[1], line.ratio, *ends[2], line.tokens_read, line.seconds),
    ]
    counts = [line.method, str(line.windows), str(line.expected), str(line.positions)]
    return [*counts, *map(number, values), line.calibration, line.storage, flags(line)]
