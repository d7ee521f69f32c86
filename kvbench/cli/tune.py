"""``kvbench tune``: a table of choices for each layer, searched under a budget."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.options import Device, Drawn, DrawnFrom, Dtype, Models, OneProtocol, Seed, Unscored
from kvbench.cli.progress import Terminal
from kvbench.cli.report import print_paths
from kvbench.defaults import TUNED

if TYPE_CHECKING:
    from kvbench.tuning.request import TuneRequest


class Objective(StrEnum):
    """What a table is judged by."""

    KL = "kl"
    ACCURACY = "accuracy"


Bits = Annotated[
    float | None,
    typer.Option(help="Budget in stored bits an element, metadata counted; 4.25 if not given."),
]
Bytes = Annotated[
    int | None, typer.Option("--bytes", help="Budget in mean bytes of a prompt's cache.")
]


def tune(
    method: Annotated[
        str, typer.Option(help="A method with choices for each layer: kvtuner[scheme=kivi].")
    ] = TUNED,
    models: Models = "smol_llava",
    bits: Bits = None,
    nbytes: Bytes = None,
    objective: Annotated[
        Objective, typer.Option(help="KL to FP16's answers, or accuracy.")
    ] = Objective.KL,
    tasks: DrawnFrom = "all",
    protocol: OneProtocol = "quantized_prefill",
    data: Unscored = None,
    samples: Drawn = 12,
    trials: Annotated[int, typer.Option(help="Tables that the model is run with.")] = 40,
    clusters: Annotated[int, typer.Option(help="Groups of layers that share a choice.")] = 6,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Folder for a folder of each model; a search there goes on.")
    ] = Path("results/runs/tune"),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Search which layers need how many bits (Optuna NSGA-II); writes a preset and the front."""
    from kvbench.errors import UserError
    from kvbench.evaluation import choices
    from kvbench.tuning.request import TuneRequest

    chosen, protocols = choices.choose_methods(method), choices.choose_protocols(protocol)
    if len(chosen) != 1 or len(protocols) != 1:
        raise UserError("a search has one method and one protocol: give one of each")
    request = TuneRequest(
        method=chosen[0],
        models=choices.choose_models(models),
        tasks=choices.choose_tasks(tasks),
        out=out,
        bits=4.25 if bits is None and nbytes is None else bits,
        nbytes=nbytes,
        objective=objective.value,
        protocol=protocols[0],
        data_root=data,
        samples=samples,
        trials=trials,
        clusters=clusters,
        seed=seed,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
    _run(request)


def _run(request: TuneRequest) -> None:
    from kvbench.report.tuning import tuning_summary, write_tuning
    from kvbench.tuning.run import tune as run

    with Terminal() as progress:
        for folder in run(request, progress):
            paths = write_tuning(folder)
            typer.echo(tuning_summary(folder))
            print_paths(paths)
