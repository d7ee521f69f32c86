"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Methods = Annotated[
    str,
    typer.Option(help='all, or names with parameters: "kivi,akvq_vl[recent=64,clip=0.7]".'),
]
Models = Annotated[
    str, typer.Option(help="all, or names; name=/folder takes the checkpoint from there.")
]
Model = Annotated[
    str, typer.Option(help="Name of a model; name=/folder takes the checkpoint from there.")
]
Tasks = Annotated[str, typer.Option(help="all (MileBench's twelve), or names.")]
Protocol = Annotated[
    str, typer.Option(help="quantized_prefill, exact_prefill, both, or sparse_prefill.")
]
OneProtocol = Annotated[str, typer.Option(help="quantized_prefill or exact_prefill.")]
Run = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; continues a run that is there already."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        envvar="KVBENCH_DATA",
        help="Folder with the tasks' folders in MileBench's layout; without it, minimile.",
    ),
]
# Not KVBENCH_DATA: what is scored must not be tuned or analyzed on unasked.
Unscored = Annotated[
    Path | None,
    typer.Option(
        help="Folder in MileBench's layout; without it, minimile's split that no task scores."
    ),
]
DrawnFrom = Annotated[str, typer.Option(help="Tasks to draw prompts from: all, or names.")]
Drawn = Annotated[int, typer.Option(help="Prompts, drawn evenly from the tasks.")]
Seed = Annotated[int, typer.Option(help="Which samples are taken where not all are.")]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:N, or auto-map: a model's layers spread over all GPUs."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Limit = Annotated[int | None, typer.Option(help="At most so many samples a task.")]
Batch = Annotated[int, typer.Option(help="Samples generated together.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Longest answer; 512 for MileBench, 16 for generated data if not given."),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that share the work, each with a GPU if there are several."),
]
Executor = Annotated[str, typer.Option(help="local: this machine; ray: a Ray cluster (extra ray).")]
Address = Annotated[
    str | None,
    typer.Option(
        help="With --executor ray, the cluster's; RAY_ADDRESS if not given, else a new one here."
    ),
]
GpusPerWorker = Annotated[
    int | None, typer.Option(help="GPUs of each worker; 1 if not given, more with auto-map.")
]
Statistics = Annotated[Path | None, typer.Option(help="Folder that kvbench calibrate wrote.")]
