"""``kvbench perplexity``: text read through every method's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.matching import run_match
from kvbench.cli.options import Device, Dtype, Methods, Model, Run
from kvbench.cli.resume import run_resumable
from kvbench.defaults import REFERENCE
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.perplexity.request import PerplexityRequest

Text = Annotated[str, typer.Option(help="A UTF-8 file, or pydoc: Python's own language reference.")]
Protocol = Annotated[str, typer.Option(help="quantized_prefill, exact_prefill or both.")]
Limit = Annotated[
    int, typer.Option(help="At most so many windows, at equal distances; 0 is all.", min=0)
]
Context = Annotated[
    int, typer.Option(help="Under exact_prefill, tokens of a window before the first scored one.")
]
Bits = Annotated[
    str | None,
    typer.Option(help="First set every method to these stored bits an element: 2.25,2.75,4.25."),
]


def perplexity(
    model: Model = "smollm2",
    methods: Methods = "all",
    text: Text = "pydoc",
    protocol: Protocol = "quantized_prefill",
    limit: Limit = 8,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    context: Context = 896,
    batch: Annotated[int, typer.Option(help="Windows read together.")] = 8,
    out: Run = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    bits: Bits = None,
    samples: Annotated[int, typer.Option(help="With --bits, windows to measure storage with.")] = 4,
    plan: Annotated[
        bool, typer.Option("--plan", help="With --bits, only find the settings.")
    ] = False,
) -> None:
    """Score text through the cache: perplexity, and the divergence from FP16 at every token."""
    from kvbench.api import new_run
    from kvbench.evaluation import choices
    from kvbench.perplexity.request import PerplexityRequest

    if plan and bits is None:
        raise UserError("--plan shows the settings of --bits: give both")
    models = choices.choose_models(model)
    if len(models) != 1:
        raise UserError(f"--model {model} names {len(models)} models: name one")
    request = PerplexityRequest(
        methods=choices.choose_methods(methods if bits else f"{REFERENCE},{methods}"),
        model=models[0],
        protocols=choices.choose_protocols(protocol),
        out=out or new_run(),
        text=text,
        limit=limit or None,
        window=window,
        context=context,
        batch=batch,
        device=device,
        dtype=dtype,
    )
    if bits is None:
        _measure(request)
    else:
        _match(request, bits, samples, plan)


def _measure(request: PerplexityRequest) -> None:
    """The methods as they are."""
    from kvbench.perplexity.rows import ROWS
    from kvbench.perplexity.run import measure

    run_resumable(request.out, ROWS, lambda progress: measure(request, progress))


def _match(request: PerplexityRequest, bits: str, samples: int, plan: bool) -> None:
    """The methods at the same sizes."""
    from kvbench.matching.request import MatchRequest, read_budgets
    from kvbench.matching.text import OnText

    run_match(MatchRequest(OnText(request, samples), read_budgets(bits)), plan)
