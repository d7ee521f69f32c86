"""What a run ran on: versions, platform, devices, commit. Written to ``run.json``."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import kvbench

_PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "lm-eval",
    "triton",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
)


def environment(devices: Sequence[str] | None = None) -> dict[str, Any]:
    """Collect versions, platform, devices and the checkout's commit; imports nothing heavy.

    Devices that aren't given are listed only when torch has been imported already. ``commit`` is
    None outside a checkout of kvbench.
    """
    return {
        "kvbench": kvbench.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices() if devices is None else list(devices),
        **_commit(Path(kvbench.__file__).resolve().parents[1]),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _commit(root: Path) -> dict[str, Any]:
    top = _git(root, "rev-parse", "--show-toplevel")
    # Installed inside somebody else's repository, that one's commit would say nothing of kvbench.
    if top is None or Path(top).resolve() != root:
        return {"commit": None, "modified": None}
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git(root, "rev-parse", "HEAD"),
        "modified": bool(status) if status is not None else None,
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(  # git as the user's shell would find it  # nosec B607
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
