"""Code to begin with: files that work and pass their tests as written."""

from __future__ import annotations

from kvbench.skeletons.method import Skeleton, method_skeleton

__all__ = ["Skeleton", "method_skeleton"]
