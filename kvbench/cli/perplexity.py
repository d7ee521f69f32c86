"""``kvbench perplexity``: text read through every method's cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli.options import Device, Dtype, Methods
from kvbench.cli.resume import new_folder, run_resumable
from kvbench.errors import UserError


def perplexity(
    model: Annotated[
        str, typer.Option(help="Name of a model; name=/folder takes the checkpoint from there.")
    ] = "smollm2",
    methods: Methods = "all",
    text: Annotated[
        str, typer.Option(help="A UTF-8 file, or pydoc: Python's own language reference.")
    ] = "pydoc",
    protocol: Annotated[
        str, typer.Option(help="quantized_prefill, exact_prefill or both.")
    ] = "quantized_prefill",
    limit: Annotated[
        int, typer.Option(help="At most so many windows, at equal distances; 0 is all.", min=0)
    ] = 8,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    context: Annotated[
        int,
        typer.Option(help="Under exact_prefill, tokens of a window before the first scored one."),
    ] = 896,
    batch: Annotated[int, typer.Option(help="Windows read together.")] = 8,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; continues a run that is there already."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Score text through the cache: perplexity, and the divergence from FP16 at every token."""
    from kvbench.evaluation import choices
    from kvbench.perplexity.request import PerplexityRequest

    models = choices.choose_models(model)
    if len(models) != 1:
        raise UserError(f"--model {model} names {len(models)} models: name one")
    request = PerplexityRequest(
        methods=choices.choose_methods(f"{choices.REFERENCE},{methods}"),
        model=models[0],
        protocols=choices.choose_protocols(protocol),
        out=out or new_folder(),
        text=text,
        limit=limit or None,
        window=window,
        context=context,
        batch=batch,
        device=device,
        dtype=dtype,
    )
    from kvbench.perplexity.rows import ROWS
    from kvbench.perplexity.run import measure

    run_resumable(request.out, ROWS, lambda progress: measure(request, progress))
