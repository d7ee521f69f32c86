"""``kvbench lm-eval``: any generative task of lm-eval with every method's cache."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.options import Device, Dtype, Methods, Model, OneProtocol, Statistics
from kvbench.cli.resume import run_resumable
from kvbench.defaults import REFERENCE
from kvbench.errors import UserError


def lm_eval(
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, groups or tags.")],
    model: Model = "smollm2",
    methods: Methods = "all",
    include: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of tasks of your own.")
    ] = None,
    protocol: OneProtocol = "quantized_prefill",
    limit: Annotated[int | None, typer.Option(help="At most so many documents a task.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question; the task's own number if none.")
    ] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help='For generation, such as "max_gen_toks=64".')
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Use the checkpoint's chat template.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    calibration: Statistics = None,
) -> None:
    """Run tasks that generate, text or images, with each method; metrics beside what was read."""
    # Read when the libraries are imported: data that are not here are told of, not fetched.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    # It warns of being given a loaded model, once a method.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from kvbench.api import new_run
    from kvbench.evaluation import choices
    from kvbench.evaluation.lm_eval_run import LmEvalRequest, run_lm_eval
    from kvbench.evaluation.rows import LM_EVAL

    models, protocols = choices.choose_models(model), choices.choose_protocols(protocol)
    if len(models) != 1 or len(protocols) != 1:
        raise UserError("lm-eval runs one model under one protocol: name one of each")
    request = LmEvalRequest(
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        methods=choices.choose_methods(f"{REFERENCE},{methods}"),
        model=models[0],
        protocol=protocols[0],
        out=out or new_run(),
        include=include,
        limit=limit,
        num_fewshot=num_fewshot,
        generation=gen_kwargs,
        chat=apply_chat_template,
        calibration=calibration,
        device=device,
        dtype=dtype,
    )
    run_resumable(request.out, LM_EVAL, lambda progress: run_lm_eval(request, progress))
