"""Free space where kvbench writes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from kvbench.doctor.findings import Finding, Status

SECTION = "disk"
ENOUGH, TOO_LITTLE = 10 * 2**30, 2**30
"""Bytes: a 7B checkpoint takes 14 GB; the generated data and the bundled model under 1 GiB."""


def disks() -> Iterator[Finding]:
    """Free space for results, for generated data and bundled models, and for checkpoints."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from platformdirs import user_cache_path

    places = {
        "results": (Path.cwd(), "free space there, or name another folder with --out"),
        "kvbench's cache": (user_cache_path("kvbench"), "free space, or set XDG_CACHE_HOME"),
        "checkpoints": (Path(HF_HUB_CACHE), "free space, or set HF_HOME"),
    }
    for name, (folder, advice) in places.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        yield _free(name, folder, shutil.disk_usage(there).free, advice)


def _free(name: str, folder: Path, free: int, advice: str) -> Finding:
    text = f"{free / 2**30:.1f} GiB free for {folder}"
    if free >= ENOUGH:
        return Finding(SECTION, Status.OK, name, text)
    status = Status.FAIL if free < TOO_LITTLE else Status.NOTE
    return Finding(SECTION, status, name, text, advice)
