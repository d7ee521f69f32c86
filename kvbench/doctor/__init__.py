"""Is this machine ready, and can its numbers be trusted? Findings, each with what to do."""

from __future__ import annotations

from kvbench.doctor.examine import examine
from kvbench.doctor.findings import Finding, Status
from kvbench.doctor.request import DoctorRequest

__all__ = ["DoctorRequest", "Finding", "Status", "examine"]
