"""A grid on a Ray cluster of this machine: the sequential rows, whoever dies on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

Evaluated = Callable[..., list[SampleRow]]
Same = Callable[[Path, Path], None]
Running = Callable[[list[psutil.Process]], list[psutil.Process]]
Killer = Callable[[str, int], Any]


def test_a_killed_actor_costs_nothing(
    evaluated: Evaluated,
    same_results: Same,
    killer: Killer,
    private_cache: Path,
    tmp_path: Path,
    still_running: Running,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options: dict[str, Any] = {"methods": "fp16,rtn_int2", "max_new_tokens": 16}
    listener = killer("ray::Worker", 7)
    rows = evaluated(listener, **options, executor="ray", workers=2, out=tmp_path / "run")
    assert listener.killed
    evaluated(**options, out=tmp_path / "one")
    same_results(tmp_path / "run", tmp_path / "one")
    assert listener.total == listener.advanced == len(rows) == 2 * 2 * 6
    (died,) = listener.notes
    assert died.startswith("a worker process died at samples ")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert not ray.is_initialized()
    assert len(listener.family) >= 4 and not still_running(listener.family)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there(evaluated: Evaluated, address: str) -> None:
    with pytest.raises(UserError, match=f"Ray at {address} can't be used .* give no --address"):
        evaluated(executor="ray", address=address)
