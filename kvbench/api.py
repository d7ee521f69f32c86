"""What the verbs of the command line do, as functions: names as typed there, typed rows back.

`kvbench eval`, `kvbench efficiency` and `kvbench compare` call these.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.defaults import MEASURED
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.efficiency.rows import EfficiencyRow
    from kvbench.efficiency.scenario import Conditions, Scenario
    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.request import EvalRequest
    from kvbench.evaluation.rows import SampleRow
    from kvbench.report.regression import Comparison

PAPER = "paper"
Names = str | Iterable[str]
"""``"kivi,akvq_vl[recent=64]"``, or the same as a list of texts."""


def evaluate(
    methods: Names = "all",
    models: Names = "smol_llava",
    tasks: Names = "all",
    *,
    protocol: Names = "quantized_prefill",
    out: Path | str | None = None,
    data_root: Path | str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 1,
    max_new_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | None = None,
    executor: str = "local",
    address: str | None = None,
    gpus_per_worker: int | None = None,
    calibration: Path | str | None = None,
    calibration_samples: int = 32,
    progress: Progress | None = None,
) -> list[SampleRow]:
    """Answer tasks with every method and return a row for each sample, as `kvbench eval` does.

    Args:
        methods: "all", or names with parameters, "akvq_vl[recent=64]". fp16 among them gives the
            others their KL divergence and agreement.
        models: Names; "name=/folder" takes the checkpoint from there.
        tasks: "all" (MileBench's twelve), or names.
        protocol: "quantized_prefill", "exact_prefill", "both", or "sparse_prefill".
        out: Folder of the rows. One with rows is continued: what is there is not run again. None:
            a new folder in ``results/runs``.
        data_root: Folder in MileBench's layout; None: each task's bundled data.
        limit: At most so many samples of each task; None: all.
        seed: Which samples a limit picks.
        batch: Samples generated together.
        max_new_tokens: Longest answer in tokens; None: 512 for MileBench, 16 for generated data.
        device: "auto" (CUDA if there is any), "cpu", "cuda", "cuda:N", or "auto-map" (a model's
            layers spread over all GPUs).
        dtype: "auto" (the model's own), "bfloat16", "float16" or "float32".
        workers: Processes that share the work; None: one, or with Ray one for each GPU. Above 1,
            call this below ``if __name__ == "__main__":``.
        executor: "local" (this machine) or "ray" (a cluster).
        address: Of the Ray cluster; None starts one of this machine.
        gpus_per_worker: GPUs of each worker, where there are any; None: one.
        calibration: Folder that `kvbench calibrate` wrote; None: calibrates where a method needs
            it.
        calibration_samples: Samples to calibrate with, of a split that no task scores.
        progress: Who listens; None: nobody.

    Returns:
        Every row of the folder `out`, those of earlier runs included. ``correct`` is a bool,
        ``cache_bytes`` are bytes, ``kl_first`` and ``kl_mean`` nats, ``seconds`` seconds by part;
        None where there is nothing to say. ``pandas.DataFrame(rows)`` takes them as they are.

    Raises:
        UserError: A name is unknown, a value out of range, or data, a model or the folder can't be
            used; rows so far are kept.
    """
    from kvbench.evaluation.progress import Silent
    from kvbench.evaluation.run import evaluate as run
    from kvbench.evaluation.store import SAMPLES, read_rows

    request = evaluation_request(
        methods,
        models,
        tasks,
        protocol=protocol,
        out=out,
        data_root=data_root,
        limit=limit,
        seed=seed,
        batch=batch,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        workers=workers,
        executor=executor,
        address=address,
        gpus_per_worker=gpus_per_worker,
        calibration=calibration,
        calibration_samples=calibration_samples,
    )
    run(request, progress or Silent())
    rows = request.out / SAMPLES
    return read_rows(rows) if rows.exists() else []


def evaluation_request(
    methods: Names,
    models: Names,
    tasks: Names,
    *,
    protocol: Names,
    out: Path | str | None,
    data_root: Path | str | None,
    calibration: Path | str | None,
    **fields: Any,
) -> EvalRequest:
    """What `evaluate` runs for these arguments; `fields` are fields of `EvalRequest`.

    Raises:
        UserError: A name is unknown, a value out of range, or a folder is missing.
    """
    from kvbench.evaluation import choices
    from kvbench.evaluation.request import EvalRequest

    return EvalRequest(
        methods=choices.choose_methods(_typed(methods)),
        models=choices.choose_models(_typed(models)),
        tasks=choices.choose_tasks(_typed(tasks)),
        protocols=choices.choose_protocols(_typed(protocol)),
        out=_out(out),
        data_root=_path(data_root),
        calibration=_path(calibration),
        **fields,
    )


def measure_efficiency(
    methods: Names | None = None,
    models: Names = "llava15_7b",
    *,
    gpu: str = "v100",
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    vision_tokens: int | None = None,
    batch: int | str | Iterable[int | str] | None = None,
    preset: str | None = None,
    out: Path | str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    prefill_rows: int | None = None,
    timeout: float = 600.0,
    minutes: float | None = None,
    tolerance: float = 0.01,
    progress: Progress | None = None,
) -> list[EfficiencyRow]:
    """Measure memory, largest batch and speed of methods, as `kvbench efficiency` does.

    Without a GPU, or for a card with more memory than there is, the capacity model answers, and
    the row's ``memory`` is "modelled".

    Args:
        methods: "all", or names with parameters; None: fp16 and akvq_vl.
        models: Names; "name=/folder" takes the shapes, and weights if there are any, from there.
        gpu: A card's name, such as "h100", or "auto": this one.
        input_tokens: Of a prompt; None: 600.
        output_tokens: Of an answer; None: 512.
        vision_tokens: Of the prompt; None: as many whole images as fit.
        batch: Rows, "largest", or several of them; None: the largest that completes.
        preset: "paper": all that the AKVQ-VL paper claims, instead of methods, tokens and batch.
        out: Folder of the rows. One with rows is continued. None: a new folder in
            ``results/runs``.
        dtype: "auto" (the model's own), "bfloat16", "float16" or "float32".
        seed: Of random weights and prompts.
        prefill_rows: Prompts that the engine runs at once; None: by their length.
        timeout: Seconds for one try.
        minutes: Stop after them with the rows there are; None: take what it takes.
        tolerance: The largest batch is found to this share of itself.
        progress: Who listens; None: nobody.

    Returns:
        The newest row of every setting in the folder `out`: bytes, seconds, tokens a second; None
        where there is nothing to say. ``pandas.DataFrame(rows)`` takes them as they are.

    Raises:
        UserError: A name is unknown, a value out of range, a model's shapes aren't known, or the
            folder can't be used; rows so far are kept.
    """
    from kvbench.efficiency.rows import ROWS, read_efficiency
    from kvbench.efficiency.run import measure
    from kvbench.evaluation.progress import Silent

    scenarios, conditions = efficiency_request(
        methods,
        models,
        gpu=gpu,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        vision_tokens=vision_tokens,
        batch=batch,
        preset=preset,
        out=out,
        dtype=dtype,
        seed=seed,
        prefill_rows=prefill_rows,
        timeout=timeout,
        minutes=minutes,
        tolerance=tolerance,
    )
    measure(scenarios, conditions, progress or Silent())
    rows = conditions.out / ROWS
    return read_efficiency(conditions.out) if rows.exists() else []


def efficiency_request(
    methods: Names | None = None,
    models: Names = "llava15_7b",
    *,
    gpu: str,
    input_tokens: int | None = None,
    output_tokens: int | None = None,
    vision_tokens: int | None = None,
    batch: int | str | Iterable[int | str] | None = None,
    preset: str | None = None,
    out: Path | str | None = None,
    **conditions: Any,
) -> tuple[list[Scenario], Conditions]:
    """What `measure_efficiency` runs for these arguments; `conditions` are fields of `Conditions`.

    Raises:
        UserError: A name is unknown, a value out of range, or a preset is given what it sets.
    """
    from kvbench.efficiency.profiles import choose_profile
    from kvbench.efficiency.scenario import Conditions

    given = {
        "methods": None if methods is None else _typed(methods),
        "batch": None if batch is None else _typed(batch),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "vision_tokens": vision_tokens,
    }
    given = {name: value for name, value in given.items() if value is not None}
    scenarios = _scenarios(preset, _typed(models), given)
    return scenarios, Conditions(target=choose_profile(gpu), out=_out(out), **conditions)


def _scenarios(preset: str | None, models: str, given: dict[str, Any]) -> list[Scenario]:
    from kvbench.efficiency.preset import paper_scenarios
    from kvbench.efficiency.scenario import grid, read_batches

    if preset is None:
        methods, batches = given.pop("methods", MEASURED), given.pop("batch", "largest")
        return grid(models, methods, read_batches(batches), **given)
    if preset != PAPER:
        raise UserError(f"unknown preset {preset!r}: there is {PAPER}")
    for name in given:
        option = name.replace("_", "-")
        raise UserError(f"--preset {preset} has its own --{option}: leave one of them out")
    return paper_scenarios(models)


def compare(
    run: Path | str,
    baseline: Path | str,
    *,
    max_drop: float = 1.0,
    max_kl: float | None = None,
    any_images: bool = False,
) -> Comparison:
    """Hold a run against a baseline, sample by sample, as `kvbench compare` does.

    Args:
        run: Folder that an evaluation wrote, or a saved baseline.
        baseline: The same of an earlier run.
        max_drop: Points of accuracy that a task or a mean may lose.
        max_kl: Factor by which a method's KL divergence to fp16 may grow; None: not judged.
        any_images: Accept image files with other bytes.

    Returns:
        ``ok`` says whether nothing got worse; ``methods`` has, for each method and protocol, its
        mean, its tasks and its ``faults``; ``notes`` are sentences on what differs unjudged.

    Raises:
        UserError: One of them can't be read, or has nothing in common with the other.
    """
    from kvbench.report.regression import Limits, check, read_outcomes

    limits = Limits(max_drop=max_drop, any_images=any_images, max_kl=max_kl)
    return check(read_outcomes(Path(run)), read_outcomes(Path(baseline)), limits)


def new_run() -> Path:
    """A folder in ``results/runs`` named by the time."""
    return Path("results/runs") / time.strftime("%Y%m%d-%H%M%S")


def _out(path: Path | str | None) -> Path:
    return new_run() if path is None else Path(path)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _typed(names: int | str | Iterable[int | str]) -> str:
    """Names as one would type them."""
    return str(names) if isinstance(names, int | str) else ",".join(map(str, names))
