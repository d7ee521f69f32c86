"""One model after the other: run the prompts, put the records together, write the tables."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.analysis import tables
from kvbench.analysis.patterns import (
    LayerPattern,
    PromptAttention,
    pattern_of,
    text_salient_layers,
)
from kvbench.analysis.prompts import Prompt, prompts
from kvbench.analysis.records import PromptRecord, record
from kvbench.analysis.request import AnalysisRequest
from kvbench.errors import UserError
from kvbench.evaluation.calibration import (
    calibrated,
    calibration_file,
    statistics_for,
    statistics_of,
)
from kvbench.evaluation.environment import environment
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.hardware import check_available, load
from kvbench.evaluation.progress import Progress

if TYPE_CHECKING:
    from kvbench.cache import BoundMethod, Calibration, KVQuantizer
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

SUMMARY = "analysis.json"


def analyze(request: AnalysisRequest, progress: Progress) -> Iterator[Path]:
    """Look into every model and write its tables; yields the models' folders.

    Raises:
        UserError: data, a model or a method can't be used, or a folder can't be written to.
    """
    for entry in request.models:
        check_available(entry)
    progress.begin(len(request.models) * request.samples, 0)
    for entry in request.models:
        yield _analyze(load(entry, request.device, request.dtype), request, progress)


def _analyze(loaded: LoadedModel, request: AnalysisRequest, progress: Progress) -> Path:
    detector = _bound(loaded, request.detector, None)
    methods = _methods(loaded, request, progress)
    progress.cell(loaded.entry.name)
    sources: list[Prompt] = []
    records: list[PromptRecord] = []
    for prompt in prompts(loaded, request):
        whole = len(records) < request.whole_prompt
        records.append(record(prompt.inputs, methods, detector, request.near, whole))
        sources.append(prompt)
        progress.advance()
    patterns = [
        pattern_of([PromptAttention.of(r.attention[i], r.pivots[i].few) for r in records])
        for i in range(len(detector.specs))
    ]
    folder = request.out / loaded.entry.name
    folder.mkdir(parents=True, exist_ok=True)
    for table in _tables(loaded, sources, records, patterns):
        write_atomically(folder / f"{table.name}.csv", table.csv())
    summary = _summary(loaded, request, sources, patterns)
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return folder


def _methods(
    loaded: LoadedModel, request: AnalysisRequest, progress: Progress
) -> dict[str, BoundMethod]:
    """The request's methods bound to the model; peers' caches can't be looked into."""
    from kvbench.cache import ForeignCache

    ours = []
    for choice in request.methods:
        if isinstance(choice.quantizer, ForeignCache):
            progress.note(f"{choice.spec} is left out: it brings a cache of its own")
        else:
            ours.append(choice)
    needing = calibrated(ours)
    statistics = _statistics(loaded, request, needing, progress) if needing else None
    return {choice.spec: _bound(loaded, choice, statistics) for choice in ours}


def _bound(
    loaded: LoadedModel, choice: MethodChoice, statistics: Calibration | None
) -> BoundMethod:
    from kvbench.cache import ForeignCache, bind

    if isinstance(choice.quantizer, ForeignCache):
        raise UserError(f"{choice.spec} brings a cache of its own and picks no pivots.")
    return bind(
        loaded.model,
        choice.quantizer,
        calibration=statistics,
        text_salient_layers=loaded.entry.tsa_layers,
    )


def _statistics(
    loaded: LoadedModel,
    request: AnalysisRequest,
    needing: Mapping[str, KVQuantizer],
    progress: Progress,
) -> Calibration:
    from kvbench.cache import load_calibration

    names = statistics_for(needing)
    if request.calibration is not None:
        return load_calibration(calibration_file(request.calibration, loaded.entry), names)
    progress.note(f"calibrating {loaded.entry.name} for {', '.join(needing)}")
    return statistics_of(loaded, names, request.samples, request.seed)


def _tables(
    loaded: LoadedModel,
    sources: Sequence[Prompt],
    records: Sequence[PromptRecord],
    patterns: Sequence[LayerPattern],
) -> Iterator[tables.Table]:
    shown, count = records[0], len(patterns)
    texts = [loaded.tokens.decode([token]) for token in sources[0].inputs.input_ids[0].tolist()]
    yield tables.patterns_table(patterns, text_salient_layers(patterns))
    yield tables.heads_table(patterns)
    yield tables.maps_table(shown, sorted({0, min(1, count - 1), count // 2, count - 1}))
    yield tables.positions_table(shown)
    yield tables.massive_table(records)
    yield tables.detector_table(records)
    yield tables.pivots_table(shown, texts)
    yield tables.outliers_table(records)
    yield tables.channels_table(records)
    if shown.errors:
        yield tables.errors_table(records)


def _summary(
    loaded: LoadedModel,
    request: AnalysisRequest,
    sources: Sequence[Prompt],
    patterns: Sequence[LayerPattern],
) -> dict[str, Any]:
    """What was found and how, as JSON values."""
    entry, found = loaded.entry, text_salient_layers(patterns)
    return {
        "model": entry.name,
        "label": entry.label,
        "revision": loaded.revision,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "text_salient_layers": found,
        "zoo_text_salient_layers": entry.tsa_layers,
        "sure": all(pattern.sure for pattern in patterns[: len(found) + 1]),
        "models_option": models_option(entry, found),
        "dataset": sources[0].dataset,
        "prompts": [
            {
                "task": source.task,
                "sample_id": source.sample_id,
                "tokens": source.inputs.is_vision.numel(),
                "vision_tokens": int(source.inputs.is_vision.sum()),
            }
            for source in sources
        ],
        "near": request.near,
        "whole_prompt": min(request.whole_prompt, len(sources)),
        "detector": request.detector.spec,
        "methods": [choice.spec for choice in request.methods],
        "command": shlex.join(["kvbench", *sys.argv[1:]]),
        "version": kvbench.__version__,
        "environment": environment(),
    }


def models_option(entry: ModelEntry, layers: Sequence[int]) -> str:
    """What `--models` of other verbs takes to use these text-salient layers."""
    folder = f"={entry.folder}" if entry.folder else ""
    return f"{entry.name}[tsa_layers=({','.join(map(str, layers))})]{folder}"
