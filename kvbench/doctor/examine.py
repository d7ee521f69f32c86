"""The examination, from what costs nothing to what loads a model."""

from __future__ import annotations

from collections.abc import Iterator

from kvbench.doctor.checks import model_checks
from kvbench.doctor.devices import devices
from kvbench.doctor.disk import disks
from kvbench.doctor.findings import Finding
from kvbench.doctor.kernels import triton
from kvbench.doctor.request import DoctorRequest
from kvbench.doctor.supplies import data, models
from kvbench.doctor.versions import versions


def examine(request: DoctorRequest) -> Iterator[Finding]:
    """Yield findings section by section, each as soon as it is there.

    A thing that can't be examined is a finding, not an exception.
    """
    yield from versions()
    yield from devices()
    yield from triton(request.device)
    yield from models(request.model)
    yield from data(request.data_root)
    yield from disks()
    if request.model is not None:
        yield from model_checks(request, request.model)
