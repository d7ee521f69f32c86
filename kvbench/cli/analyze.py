"""``kvbench analyze``: attention patterns, pivots, outliers and the error of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.options import Device, Drawn, DrawnFrom, Dtype, Models, Seed, Statistics, Unscored
from kvbench.cli.progress import Terminal
from kvbench.cli.report import print_paths
from kvbench.defaults import ANALYZED, DETECTOR

if TYPE_CHECKING:
    from kvbench.analysis.request import AnalysisRequest


def analyze(
    models: Models = "smol_llava",
    data: Unscored = None,
    tasks: DrawnFrom = "all",
    samples: Drawn = 12,
    methods: Annotated[
        str, typer.Option(help="Methods whose error is taken apart by layer.")
    ] = ANALYZED,
    detector: Annotated[
        str, typer.Option(help="Method whose pivots are held against attention.")
    ] = DETECTOR,
    near: Annotated[
        int, typer.Option(help="Tokens before a query that are local and tell no kinds apart.")
    ] = 16,
    whole_prompt: Annotated[
        int,
        typer.Option(
            help="Prompts on which each layer alone is also stored under quantized_prefill: a run "
            "of the model for each layer and method."
        ),
    ] = 0,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="Folder for a folder of each model.")] = Path(
        "results/analysis"
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    calibration: Statistics = None,
) -> None:
    """Find text-salient layers, pivots, outliers and each layer's error; tables and figures."""
    from kvbench.analysis.request import AnalysisRequest
    from kvbench.evaluation import choices

    request = AnalysisRequest(
        models=choices.choose_models(models),
        methods=choices.choose_methods(methods),
        detector=choices.choose_methods(detector)[0],
        tasks=choices.choose_tasks(tasks),
        out=out,
        data_root=data,
        samples=samples,
        seed=seed,
        near=near,
        whole_prompt=whole_prompt,
        device=device,
        dtype=dtype,
        calibration=calibration,
    )
    _run(request)


def _run(request: AnalysisRequest) -> None:
    from kvbench.analysis.run import analyze as run
    from kvbench.report.analysis import analysis_summary, write_analysis

    with Terminal() as progress:
        for folder in run(request, progress):
            paths = write_analysis(folder)
            typer.echo(analysis_summary(folder))
            print_paths(paths)
