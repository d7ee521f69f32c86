"""``kvbench calibrate``: statistics for methods that need them, kept for later runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.options import Device, Dtype, Methods, Models, Seed
from kvbench.cli.progress import Terminal
from kvbench.cli.report import print_paths


def calibrate(
    out: Annotated[Path, typer.Option(help="Folder for the statistics.")],
    models: Models = "smol_llava",
    methods: Methods = "all",
    data: Annotated[
        Path | None,
        # Not KVBENCH_DATA: what is scored must not be calibrated on unasked.
        typer.Option(help="Folder in MileBench's layout; without it, minimile's own split."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to calibrate with.")] = 32,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Gather the statistics that methods need and store them, with where they come from."""
    from kvbench.evaluation import choices
    from kvbench.evaluation.request import CalibrationRequest

    request = CalibrationRequest(
        models=choices.choose_models(models),
        methods=choices.choose_methods(methods),
        out=out,
        data_root=data,
        samples=samples,
        seed=seed,
        device=device,
        dtype=dtype,
    )
    from kvbench.evaluation.calibration import calibrate as run

    with Terminal() as progress:
        paths = run(request, progress)
    print_paths(paths)
