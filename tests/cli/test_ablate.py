"""``kvbench ablate``: from words to a request and sweeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Invoke = Callable[..., Result]


@pytest.fixture
def runs(replace: Callable[..., None]) -> list[Any]:
    """What a run and its report were asked for."""
    seen: list[Any] = []

    def run(*arguments: Any) -> None:
        seen.append(arguments)

    replace("kvbench.analysis.ablate", ablate=run)
    replace(
        "kvbench.report.ablation",
        ablation_summary=lambda out: "the table",
        write_ablation=lambda out: [out / "ablation.md"],
    )
    return seen


def test_sweeps_and_options(invoke: Invoke, runs: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = "--sweep akvq_vl.recent=0,32 --sweep table3 --limit 3 --batch 2 --tasks oe --out"
    result = invoke("ablate", *words.split(), out)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"the table\n{out / 'ablation.md'}\n"
    ((sweeps, request, keep_tasks, _),) = runs
    assert [sweep.name for sweep in sweeps] == ["akvq_vl.recent", "table3"]
    assert [choice.spec for choice in request.methods] == ["fp16"]
    assert (request.limit, request.batch, request.tasks, request.out) == (3, 2, ("oe",), out)
    assert keep_tasks


def test_all_of_the_paper_unless_told(invoke: Invoke, runs: list[Any], tmp_path: Path) -> None:
    result = invoke("ablate", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    ((sweeps, request, keep_tasks, _),) = runs
    assert sweeps[0].name == "table3"
    assert len(sweeps) == 5
    assert not keep_tasks
    assert request.tasks == ("wqa", "dqa")


def test_a_bad_sweep_is_one_line(invoke: Invoke) -> None:
    result = invoke("ablate", "--sweep", "akvq_vl.recnt=1")
    assert result.exit_code == 2
    assert result.stderr.startswith("kvbench: unknown parameter 'recnt'")
    assert result.stderr.count("\n") == 1
