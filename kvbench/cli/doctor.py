"""``kvbench doctor``: is this machine ready, and can its numbers be trusted?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli.options import DataRoot, Device, Dtype, Methods
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.doctor import Finding

FAILED = 1


def doctor(
    model: Annotated[
        str, typer.Option(help="Model to try every method on; name=/folder as in eval; or none.")
    ] = "smol_llava",
    methods: Methods = "all",
    data_root: DataRoot = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Examine packages, devices, data and every method on a model; exits with 1 on a fault."""
    from kvbench import doctor
    from kvbench.evaluation import choices

    entries = choices.choose_models(model) if model != "none" else (None,)
    if len(entries) != 1:
        raise UserError(f"--model {model} names {len(entries)} models: name one, or none")
    request = doctor.DoctorRequest(
        methods=choices.choose_methods(methods),
        model=entries[0],
        data_root=data_root,
        device=device,
        dtype=dtype,
    )
    findings = doctor.examine(request)
    seen = _print_json(findings) if as_json else _print_lines(findings)
    if any(finding.status == doctor.Status.FAIL for finding in seen):
        raise typer.Exit(FAILED)


def _print_json(findings: Iterable[Finding]) -> list[Finding]:
    seen = list(findings)
    ok = all(finding.status != "fail" for finding in seen)
    document = {"ok": ok, "findings": [dataclasses.asdict(finding) for finding in seen]}
    typer.echo(json.dumps(document, indent=1))
    return seen


def _print_lines(findings: Iterable[Finding]) -> list[Finding]:
    """A line a finding as soon as it is there; below it what to do, if anything."""
    seen: list[Finding] = []
    for finding in findings:
        if not seen or seen[-1].section != finding.section:
            typer.echo(("\n" if seen else "") + finding.section)
        typer.echo(f"  {finding.status:<5} {finding.name}: {finding.text}")
        if finding.status != "ok":
            typer.echo(f"        do: {finding.advice}")
        seen.append(finding)
    counts = {status: sum(f.status == status for f in seen) for status in ("fail", "note", "ok")}
    typer.echo("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return seen
