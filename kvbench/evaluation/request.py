"""What a run is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.choices import MethodChoice, existing_folder
from kvbench.specs import suggestion

if TYPE_CHECKING:
    from kvbench.models.zoo import ModelEntry

DTYPES = ("auto", "bfloat16", "float16", "float32")
EXECUTORS = ("local", "ray")
_DEVICE = re.compile(r"auto|auto-map|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class EvalRequest:
    """A grid of models, methods, tasks and protocols, and where its rows go.

    Attributes:
        methods: Methods, each once.
        models: Entries of the zoo or of local folders, each name once.
        tasks: Names of tasks, each once.
        protocols: What prompt queries attend to.
        out: Folder of the result rows; a folder with rows is continued.
        data_root: Folder with MileBench's layout; None is the bundled minimile.
        limit: At most so many samples of each task; None is all.
        seed: Which samples a limit picks, and everything else that is random.
        batch: Samples generated together.
        max_new_tokens: Longest answer in tokens; None is 512 for MileBench, as officially, and 16
            for generated data, whose answers are a few words.
        device: "auto" (CUDA if there is any), "cpu", "cuda", "cuda:N" or "auto-map" (the layers of
            a model spread over all GPUs, and main memory if they are full).
        dtype: Type of weights and activations; "auto" is the model entry's own.
        workers: Processes that share the work; None is one, or with Ray one for each GPU.
        executor: "local" (this machine) or "ray" (a cluster).
        address: Of the Ray cluster; None starts one of this machine.
        gpus_per_worker: GPUs of each worker, where there are any; None is one, or with "auto-map"
            a worker's even share of this machine's.
        calibration: Folder written by `kvbench calibrate`; None calibrates where a method needs it.
        calibration_samples: How many samples to calibrate with, from a split that no task scores.

    Raises:
        UserError: A value is out of range, or a folder is missing.
    """

    methods: tuple[MethodChoice, ...]
    models: tuple[ModelEntry, ...]
    tasks: tuple[str, ...]
    protocols: tuple[str, ...]
    out: Path
    data_root: Path | None = None
    limit: int | None = None
    seed: int = 0
    batch: int = 1
    max_new_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    workers: int | None = None
    executor: str = "local"
    address: str | None = None
    gpus_per_worker: int | None = None
    calibration: Path | None = None
    calibration_samples: int = 32

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        for name in ("methods", "models", "tasks", "protocols"):
            if not getattr(self, name):
                raise UserError(f"no {name} to evaluate: name at least one, or all")
        for name, smallest in (
            ("limit", 1),
            ("seed", 0),
            ("batch", 1),
            ("workers", 1),
            ("gpus_per_worker", 1),
            ("calibration_samples", 1),
        ):
            at_least(name, getattr(self, name), smallest)
        if self.max_new_tokens is not None:
            at_least("max_new_tokens", self.max_new_tokens, 1)
        check_hardware(self.device, self.dtype)
        check_executor(self.executor, self.address)
        check_folders(self.out, self.data_root)
        existing_folder("calibration folder", self.calibration)

    @property
    def in_workers(self) -> bool:
        """Whether other processes do the work, instead of this one."""
        shared = self.executor != "local" or self.gpus_per_worker is not None
        return shared or (self.workers or 1) > 1


@dataclass(frozen=True)
class CalibrationRequest:
    """Statistics to gather from a split that no task scores, for methods that need them.

    Attributes:
        methods: Methods; those that need no statistics are passed over.
        models: Entries of the zoo or of local folders, each name once.
        out: Folder of the statistics, one safetensors file and manifest a model.
        data_root: Folder with MileBench's layout to calibrate on; None is minimile's own split.
        samples: How many samples to calibrate with.
        seed: Which samples.
        device: As in `EvalRequest`.
        dtype: As in `EvalRequest`.

    Raises:
        UserError: A value is out of range, or a folder is missing.
    """

    methods: tuple[MethodChoice, ...]
    models: tuple[ModelEntry, ...]
    out: Path
    data_root: Path | None = None
    samples: int = 32
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        at_least("samples", self.samples, 1)
        at_least("seed", self.seed, 0)
        check_hardware(self.device, self.dtype)
        check_folders(self.out, self.data_root)


def at_least(name: str, value: int | None, smallest: int) -> None:
    """Raise UserError when the option `name` is too small; None passes."""
    if value is not None and value < smallest:
        option = name.replace("_", "-")
        raise UserError(f"--{option} is {value}: give at least {smallest}")


def check_hardware(device: str, dtype: str) -> None:
    """Refuse names of devices and dtypes that nothing could have.

    Raises:
        UserError: One of them is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: {suggestion(dtype, DTYPES, 'use one of')}")
    if not _DEVICE.fullmatch(device):
        raise UserError(f"unknown device {device!r}: use auto, auto-map, cpu, cuda or cuda:N")


def check_executor(executor: str, address: str | None) -> None:
    """Refuse executors that there aren't, and an address that nothing would use.

    Raises:
        UserError: One of the two.
    """
    if executor not in EXECUTORS:
        raise UserError(
            f"unknown executor {executor!r}: {suggestion(executor, EXECUTORS, 'use one of')}"
        )
    if address is not None and executor != "ray":
        raise UserError("--address is of a Ray cluster: add --executor ray, or leave it out")


def check_folders(out: Path, data_root: Path | None) -> None:
    """Raise UserError when an output folder is a file, or a data root is no folder."""
    if out.exists() and not out.is_dir():
        raise UserError(f"output folder {out} is a file: choose another folder")
    existing_folder("data root", data_root)
