"""What lm-eval's tasks gave with every method, from ``lm_eval.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvbench.defaults import REFERENCE
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.rows import LM_EVAL
from kvbench.evaluation.statistics import Estimate, Paired, mean_of_items, pair
from kvbench.report.board import Leaderboard
from kvbench.report.documents import read_document
from kvbench.report.header import PROTOCOLS
from kvbench.report.paper import label, paper_table, rank
from kvbench.report.text import (
    MISSING,
    amount,
    code,
    csv_text,
    escape,
    markdown_table,
    number,
    p_value,
    percent,
)

NOTES = """\
Value ± standard error as lm-eval has them. Difference to FP16 on the same documents with the same
prompts, with its standard error; for metrics that are 0 or 1, documents lost and gained and the
exact McNemar p. Same answer: share of documents with FP16's answer, character by character. Bits,
bytes and packed tokens read: of the cache when an answer was through, mean over documents. A value
is left out where no answer read the quantized cache."""

_HEADERS = (
    "Task", "Metric", "Method", "n", "Value", "Difference", "Lost/gained", "p", "Same answer %",
    "Bits", "Cache bytes", "Packed tokens read", "Flags",
)  # fmt: skip
_CSV_HEADERS = (
    "task", "metric", "filter", "method", "n", "value", "stderr", "difference", "difference_se",
    "lost", "gained", "mcnemar_p", "same_answer", "bits_per_element", "cache_bytes",
    "packed_tokens_read", "flags",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One metric of one task with one method. None where nothing is known."""

    task: str
    metric: str
    filter: str
    method: str
    n: int
    value: float | None
    stderr: float | None
    difference: Estimate | None
    counts: Paired | None
    same: float | None
    bits: float | None
    cache_bytes: float | None
    tokens_read: float | None
    flags: str


def write_lm_eval(directory: Path) -> list[Path]:
    """Write ``lm_eval.md|csv``.

    Raises:
        UserError: The folder has no results, or can't be written to.
    """
    document = read_document(directory / LM_EVAL, "lm-eval")
    results = _results(document)
    texts = {"lm_eval.md": _markdown(document, results), "lm_eval.csv": _csv(results)}
    for name, text in texts.items():
        write_atomically(directory / name, text)
    return [directory / name for name in texts]


def lm_eval_text(directory: Path) -> str:
    """The table for the terminal.

    Raises:
        UserError: The folder has no results.
    """
    document = read_document(directory / LM_EVAL, "lm-eval")
    return f"\n{_title(document)}\n\n{_grid(_results(document))}"


def _results(document: Mapping[str, Any]) -> list[Result]:
    """In the order of the tasks; for each of their metrics all methods in the paper's order."""
    methods, known = document["methods"], paper_table().methods
    ordered = sorted(methods, key=lambda method: rank(known, method))
    found = [
        result for method in ordered for result in _of_method(method, methods[method], methods)
    ]
    places = {key: place for place, key in enumerate(dict.fromkeys(map(_place, found)))}
    return sorted(found, key=lambda result: places[_place(result)])


def _place(result: Result) -> tuple[str, str, str]:
    return result.task, result.metric, result.filter


def _of_method(
    method: str, content: Mapping[str, Any], methods: Mapping[str, Any]
) -> Iterator[Result]:
    for task, values in content["results"].items():
        samples = content["samples"].get(task, [])
        baseline = methods.get(REFERENCE, {}).get("samples", {}).get(task, [])
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                mine = [s for s in samples if s["filter"] == kind]
                theirs = {s["doc"]: s for s in baseline if s["filter"] == kind}
                stderr = values.get(f"{metric}_stderr,{kind}")
                numbers = [n if isinstance(n, (int, float)) else None for n in (value, stderr)]
                yield _result((task, metric, kind, method), content, mine, theirs, numbers)


def _result(
    place: tuple[str, str, str, str],
    content: Mapping[str, Any],
    samples: list[dict[str, Any]],
    baseline: Mapping[int, dict[str, Any]],
    numbers: list[float | None],
) -> Result:
    task, metric, kind, method = place
    pairs = [
        (baseline[s["doc"]], s)
        for s in samples
        if method != REFERENCE and baseline.get(s["doc"], {}).get("prompt") == s["prompt"]
    ]
    unread = [s for s in samples if content["quantizes"] and not s["packed_tokens_read"]]
    useless = bool(samples) and len(unread) == len(samples)
    lost_memory = sum(where.rpartition("/")[0] == task for where in content["out_of_memory"])
    flags = [f"cache not read: {len(unread)}"] if unread else []
    flags += [f"out of memory: {lost_memory}"] if lost_memory else []
    value, stderr = (None, None) if useless else numbers
    difference, counts = (None, None) if useless else _difference(metric, pairs)
    packed = content["storage"] == "packed"
    return Result(
        task, metric, kind, method, len(samples), value, stderr, difference, counts,
        same=_mean(float(a["answer"] == b["answer"]) for a, b in pairs),
        bits=_mean(s["bits_per_element"] for s in samples),
        cache_bytes=_mean(s["cache_bytes"] for s in samples) if packed else None,
        tokens_read=_mean(s["packed_tokens_read"] for s in samples),
        flags="; ".join(flags),
    )  # fmt: skip


def _difference(
    metric: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]
) -> tuple[Estimate | None, Paired | None]:
    """A metric's change on the same documents, where it is a number for each."""
    both = [
        (old["metrics"][metric], new["metrics"][metric])
        for old, new in pairs
        if metric in old["metrics"] and metric in new["metrics"]
    ]
    if not both:
        return None, None
    binary = all(value in (0.0, 1.0) for two in both for value in two)
    counts = pair([bool(old) for old, _ in both], [bool(new) for _, new in both])
    return mean_of_items([new - old for old, new in both]), counts if binary else None


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return math.fsum(given) / len(given) if given else None


def _title(document: Mapping[str, Any]) -> str:
    request = document["request"]
    return f"{request['model']}, {request['protocol']}, lm-eval"


def _markdown(document: Mapping[str, Any], results: list[Result]) -> str:
    request, board = document["request"], Leaderboard((), document)
    calibrated = [name for name, content in document["methods"].items() if content["calibration"]]
    facts = {
        "protocol": f"{request['protocol']}: {PROTOCOLS[request['protocol']]}",
        "documents": f"at most {request['limit']} a task" if request["limit"] else "all",
        "examples": MISSING if request["num_fewshot"] is None else str(request["num_fewshot"]),
        "generation": request["generation"] or "as each task says",
        "chat template": "the checkpoint's" if request["chat"] else "none",
        "calibration": f"{', '.join(calibrated)} on data of no task" if calibrated else MISSING,
        "lm-eval": document["environment"]["packages"].get("lm-eval") or MISSING,
        "kvbench": request["version"],
        "machine": board.machine or MISSING,
    }
    lines = [f"# {escape(_title(document))}", ""]
    lines += [f"- {name}: {escape(text)}" for name, text in facts.items()]
    lines.append(f"- command: {code(request['command'])}")
    return "\n\n".join(["\n".join(lines), _grid(results), NOTES]) + "\n"


def _grid(results: list[Result]) -> str:
    return markdown_table(_HEADERS, [_cells(result) for result in results], 3)


def _cells(result: Result) -> list[str]:
    counts = result.counts
    metric = result.metric + ("" if result.filter == "none" else f" ({result.filter})")
    difference = result.difference
    return [
        result.task,
        metric,
        label(paper_table().methods, result.method),
        str(result.n) if result.n else MISSING,
        _with_error(result.value, result.stderr, ""),
        _with_error(difference.mean, difference.standard_error, "+") if difference else MISSING,
        f"{counts.lost}/{counts.gained}" if counts else MISSING,
        p_value(counts.p) if counts else MISSING,
        percent(result.same),
        MISSING if result.bits is None else f"{result.bits:.2f}",
        amount(result.cache_bytes),
        amount(result.tokens_read),
        result.flags or MISSING,
    ]


def _with_error(value: float | None, error: float | None, sign: str) -> str:
    if value is None:
        return MISSING
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _csv(results: list[Result]) -> str:
    lines = []
    for r in results:
        change, counts = r.difference, r.counts
        values = [
            *(r.value, r.stderr),
            *((change.mean, change.standard_error) if change else (None, None)),
            *((counts.lost, counts.gained, counts.p) if counts else (None, None, None)),
            *(r.same, r.bits, r.cache_bytes, r.tokens_read),
        ]
        place = [r.task, r.metric, r.filter, r.method, str(r.n)]
        lines.append([*place, *map(number, values), r.flags])
    return csv_text(_CSV_HEADERS, lines)
