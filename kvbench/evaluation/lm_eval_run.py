"""lm-eval's tasks answered by a model with every method's cache, and all that came of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.calibration import (
    calibrated,
    calibration_file,
    keep_statistics,
    kept_statistics,
    lacking,
    statistics_for,
    statistics_of,
    statistics_of_text,
)
from kvbench.evaluation.environment import environment
from kvbench.evaluation.files import write_atomically
from kvbench.evaluation.hardware import check_available, load
from kvbench.evaluation.request import at_least, check_folders, check_hardware
from kvbench.evaluation.rows import LM_EVAL
from kvbench.evaluation.session import prepared_methods
from kvbench.evaluation.text import BUNDLED, cut, read_text

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from kvbench.cache import Calibration
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.runner import PreparedMethod
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

_CALIBRATION_SAMPLES, _CALIBRATION_WINDOW = 32, 1024


@dataclass(frozen=True)
class LmEvalRequest:
    """Tasks of lm-eval for one model with several methods.

    Attributes:
        tasks: Names of tasks, groups or tags.
        methods: Methods, each once.
        model: Entry of the zoo or of a local folder.
        protocol: What prompt queries attend to.
        out: Folder for the results.
        include: Folder with YAML files of more tasks.
        limit: At most so many documents a task; None is all.
        num_fewshot: Examples before each question; None is the task's own number.
        generation: lm-eval's `gen_kwargs`, such as ``"max_gen_toks=64"``; None is the task's own.
        chat: Whether the checkpoint's chat template goes around prompts.
        calibration: Folder written by `kvbench calibrate`; None calibrates where a method needs it.
        device: As in `EvalRequest`.
        dtype: As in `EvalRequest`.

    Raises:
        UserError: A value is out of range, or a folder is missing.
    """

    tasks: tuple[str, ...]
    methods: tuple[MethodChoice, ...]
    model: ModelEntry
    protocol: str
    out: Path
    include: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    generation: str | None = None
    chat: bool = False
    calibration: Path | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        if not self.tasks:
            raise UserError("no tasks to run: name at least one")
        at_least("limit", self.limit, 1)
        at_least("num_fewshot", self.num_fewshot, 0)
        check_hardware(self.device, self.dtype)
        check_folders(self.out, None)
        for what, folder in (("task folder", self.include), ("calibration", self.calibration)):
            if folder is not None and not folder.is_dir():
                raise UserError(f"{what} {folder} is no folder: correct the path")


def run_lm_eval(request: LmEvalRequest, progress: Progress) -> None:
    """Run every method on the tasks; ``lm_eval.json`` has what came of those that are through.

    Raises:
        UserError: a task, its data, the model or a method can't be used.
    """
    from kvbench.evaluation.lm_eval_tasks import local_tasks

    check_available(request.model)
    images = request.model.family != "text"
    manager, documents = local_tasks(
        request.tasks, request.include, images=images, limit=request.limit
    )
    loaded = load(request.model, request.device, request.dtype)
    statistics = _statistics(request, loaded, progress)
    methods = prepared_methods(loaded, request.methods, (request.protocol,), statistics, progress)
    document = {"request": _plain(request), "environment": environment(), "methods": {}}
    progress.begin(documents * len(methods), 0)
    for method in methods:
        progress.cell(f"{loaded.entry.name} · {method.spec}")
        document["methods"][method.spec] = _evaluated(request, loaded, method, manager, progress)
        request.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1, default=str)
        write_atomically(request.out / LM_EVAL, text + "\n")


def _evaluated(
    request: LmEvalRequest,
    loaded: LoadedModel,
    method: PreparedMethod,
    manager: TaskManager,
    progress: Progress,
) -> dict[str, Any]:
    """One method's metrics, and its answers with what each took and read."""
    from lm_eval import simple_evaluate

    from kvbench.evaluation.lm_eval_model import KVBenchLM, KVBenchVLM

    kind = KVBenchLM if request.model.family == "text" else KVBenchVLM
    model = kind(loaded, method)
    model.progress = progress
    results: Any = simple_evaluate(
        model,
        tasks=list(request.tasks),
        task_manager=manager,
        limit=request.limit,
        num_fewshot=request.num_fewshot,
        gen_kwargs=request.generation,
        apply_chat_template=request.chat,
        log_samples=True,
    )
    return {
        "storage": method.storage,
        "quantizes": method.bound is not None and not method.is_reference,
        "calibration": method.calibration,
        "out_of_memory": model.out_of_memory,
        "results": results["results"],
        "higher_is_better": results["higher_is_better"],
        "versions": results["versions"],
        "samples": {
            task: [_sample(model, task, sample) for sample in samples]
            for task, samples in results["samples"].items()
        },
    }


def _sample(model: Any, task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a document: neither its text nor its images."""
    usage = model.usages.get(f"{task}/{sample['doc_id']}")
    metrics = {name: sample[name] for name in sample["metrics"]}
    return {
        "doc": sample["doc_id"],
        "filter": sample["filter"],
        "prompt": sample["prompt_hash"],
        "answer": sample["resps"][0][0],
        "target": str(sample["target"]),
        "metrics": {k: float(v) for k, v in metrics.items() if isinstance(v, (bool, int, float))},
        "cache_bytes": usage.nbytes if usage else None,
        "bits_per_element": usage.bits_per_element if usage else None,
        "packed_tokens_read": usage.packed_tokens_read if usage else None,
    }


def _statistics(
    request: LmEvalRequest, loaded: LoadedModel, progress: Progress
) -> Calibration | None:
    """From the user's folder, else made on data that are no task's."""
    needing = calibrated(request.methods)
    names = statistics_for(needing)
    if not names:
        return None
    path = calibration_file(request.calibration or request.out / "calibration", loaded.entry)
    if request.calibration is None and (missing := lacking(path, names)):
        text_only = loaded.entry.family == "text"
        where = f"the end of {BUNDLED}" if text_only else "a split that no task scores"
        progress.note(f"calibrating {loaded.entry.name} for {', '.join(needing)} on {where}")
        if text_only:
            text = read_text(BUNDLED)
            window = min(_CALIBRATION_WINDOW, loaded.max_positions)
            made = statistics_of_text(loaded, missing, text, cut(loaded, text, window, 1).held_out)
        else:
            made = statistics_of(loaded, missing, _CALIBRATION_SAMPLES, 0)
        keep_statistics(made, path)
    return kept_statistics(path, loaded, names)


def _plain(request: LmEvalRequest) -> dict[str, Any]:
    """The request as JSON values, with the command line."""
    return {
        **vars(request),
        "methods": [choice.spec for choice in request.methods],
        "model": request.model.name,
        "command": shlex.join(["kvbench", *sys.argv[1:]]),
        "version": kvbench.__version__,
    }
