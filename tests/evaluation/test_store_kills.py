"""Writers of a result file, killed at random moments and started again; KVBENCH_KILLS of them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.store import read_rows

KILLS = int(os.environ.get("KVBENCH_KILLS", "6"))
RUNNER = """
import dataclasses, os, sys
from pathlib import Path
from kvbench.errors import UserError
from kvbench.evaluation.rows import SampleRow
from kvbench.evaluation.store import Store
out, template, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
template = SampleRow.from_json(template.read_text())
try:
    with Store(out) as store:
        store.write_run({"rows": wanted})
        for number in range(wanted):
            key = f"key {number}"
            if not store.has(key):
                size = 300_000 if number % 50 == 7 else 10 * (number % 300)
                row = dataclasses.replace(template, key=key, sample_id=number, answer="x" * size)
                assert store.append(row)
                os.write(1, b"%d\\n" % number)
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""
Start = Callable[[str, int], "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path, make_row: Callable[..., SampleRow]) -> Start:
    """Starts a process that writes rows 0, 1, ... as a run does, those that are there left out."""
    template = tmp_path / "template.json"
    template.write_text(make_row().to_json())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def run(name: str, rows: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-c", RUNNER, str(tmp_path / name)]
        return subprocess.Popen(
            [*command, str(template), str(rows)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )

    return run


def killed(writer: subprocess.Popen[bytes], rng: random.Random) -> set[int]:
    """The rows that a writer said were safe before it was killed."""
    assert writer.stdout is not None
    first = b""
    if rng.random() < 0.25:  # while it starts, opens and repairs
        time.sleep(rng.uniform(0, 0.3))
    else:
        first = writer.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
    writer.kill()
    said, _ = writer.communicate()
    assert writer.returncode == -9, "it ended before it could be killed"
    return {int(number) for number in (first + said).split(b"\n")[:-1]}


def test_no_row_is_lost_or_doubled_by_sigkill(tmp_path: Path, start: Start) -> None:
    rng, safe = random.Random(0), set[int]()
    path = tmp_path / "torn" / "samples.jsonl"
    for kill in range(KILLS):
        safe |= killed(start("torn", 10**6), rng)
        stored = [row.sample_id for row in read_rows(path)] if path.exists() else []
        assert stored == list(range(len(stored))), f"after kill {kill}"
        assert safe <= set(stored), f"after kill {kill}"
    wanted = len(stored) + 20
    for name in ("torn", "calm"):
        _, complaint = (last := start(name, wanted)).communicate()
        assert last.returncode == 0, complaint.decode()
    assert path.read_bytes() == (tmp_path / "calm" / "samples.jsonl").read_bytes()
    print(f"{KILLS} kills, {len(safe)} rows acknowledged, {wanted} rows in the end, none lost")


def test_of_several_writers_at_once_one_writes(tmp_path: Path, start: Start) -> None:
    writers = [start("shared", 400) for _ in range(4)]
    complaints = [writer.communicate()[1].decode() for writer in writers]
    for writer, complaint in zip(writers, complaints, strict=True):
        assert writer.returncode in (0, 2), complaint
        assert not complaint or "is in use by process" in complaint
    assert any(writer.returncode == 0 for writer in writers)
    assert [row.sample_id for row in read_rows(tmp_path / "shared" / "samples.jsonl")] == list(
        range(400)
    )
    content = (tmp_path / "shared" / "samples.jsonl").read_bytes()
    assert content.count(b"\n") == 400
