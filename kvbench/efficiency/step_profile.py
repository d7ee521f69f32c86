"""Where the time of a decode step and of a micro-batch of prompts goes, kernel by kernel.

The whole batch gets its prompts and half of its answers first, so that every row has the length
that it has in the middle of a run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvbench.cache.quantized import resolve
from kvbench.efficiency.ceilings import ceilings
from kvbench.efficiency.engine import StaticEngine, make_engine
from kvbench.efficiency.power import Power, power_of
from kvbench.efficiency.prompts import micro_batches
from kvbench.efficiency.request import TrialRequest
from kvbench.efficiency.scenario import Scenario, prompts_at_once, workload_of
from kvbench.efficiency.trial import bound_method, load_model
from kvbench.errors import UserError
from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.environment import environment
from kvbench.models.find import find_model

_WIDTH = 48  # of a kernel's name in tables


@dataclass(frozen=True)
class Launch:
    """One kernel's run on the device, in milliseconds from any origin."""

    name: str
    start: float
    ms: float


@dataclass(frozen=True)
class KernelTime:
    """A kernel in one step (or micro-batch): how often it runs, and its milliseconds in all."""

    name: str
    launches: float
    ms: float


@dataclass(frozen=True)
class Profile:
    """Kernels, longest first, and the time from the first's start to the last's end, both a pass.

    The kernels add up to less than `ms` where the device waits between them. `power` is of all
    other passes of the run, without a profiler; None where they are too few.
    """

    title: str
    ms: float
    kernels: tuple[KernelTime, ...]
    power: Power | None = None


def conditions() -> str:
    """The device with its limits as they are now, and the versions of what runs on it."""
    packages = environment()["packages"]
    versions = (f"{name} {packages[name]}" for name in ("torch", "triton", "transformers"))
    return f"{ceilings(torch.device('cuda'))}\n{', '.join(versions)}"


def step_requests(
    model: str, methods: str, batch: int, input_tokens: int, output_tokens: int, dtype: str
) -> Iterator[TrialRequest]:
    """What `profile_step` takes, for each of `methods`.

    Raises:
        UserError: There is no CUDA device, no such model or method, or it can't have such prompts.
    """
    if not torch.cuda.is_available():
        raise UserError("kvbench bench step needs a CUDA device; none was found.")
    entry = find_model(model)
    for choice in choose_methods(methods):
        scenario = Scenario(model, choice.spec, input_tokens, output_tokens, batch=batch)
        yield TrialRequest(
            model,
            choice.spec,
            workload_of(scenario, entry),
            "engine",
            dtype=entry.dtype if dtype == "auto" else dtype,
            prefill_rows=prompts_at_once(input_tokens),
        )


def profile_step(request: TrialRequest, steps: int = 8) -> list[Profile]:
    """Profile one micro-batch of prompts and `steps` decode steps of a request.

    Raises:
        UserError: There is no such model or method, or the method has no static engine.
    """
    model, entry, _ = load_model(request)
    bound = bound_method(request, model, entry, resolve(request.method))
    engine = make_engine(model, bound, request.workload)
    if not isinstance(engine, StaticEngine):
        raise UserError(f"{request.method} has no static engine to profile ({engine.path}).")
    (_, first), *others = micro_batches(model, request.workload, request.prefill_rows, request.seed)
    engine.prefill(0, first)  # compiles
    engine.forget()

    def other_prompts() -> None:
        for first_row, some in others:
            engine.prefill(first_row, some)

    def other_steps() -> None:
        for _ in range(max(request.workload.output_tokens // 2 - steps, 0)):
            engine.decode()

    prompt = _profiled(f"{len(first['input_ids'])} prompts", lambda: engine.prefill(0, first), 1)
    prompt = replace(prompt, power=power_of(other_prompts))
    power = power_of(other_steps)
    step = _profiled(f"a decode step of {request.workload.batch} rows", engine.decode, steps)
    return [prompt, replace(step, power=power)]


def summed(launches: Iterable[Launch], passes: int) -> list[KernelTime]:
    """Launches by short name, a pass, the longest first."""
    times: dict[str, list[float]] = {}
    for launch in launches:
        times.setdefault(short_name(launch.name), []).append(launch.ms)
    each = [KernelTime(n, len(ms) / passes, sum(ms) / passes) for n, ms in times.items()]
    return sorted(each, key=lambda kernel: -kernel.ms)


def short_name(name: str) -> str:
    """``void at::native::reduce_kernel<512, ...>(...)`` is ``reduce_kernel``."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain, maxsplit=1)[0].rsplit("::", 1)[-1].strip()[:_WIDTH]


def table(profiles: Iterable[Profile], most: int = 16) -> str:
    """Profiles as text, the `most` longest kernels of each."""
    from tabulate import tabulate

    blocks = []
    for profile in profiles:
        busy = sum(kernel.ms for kernel in profile.kernels)
        lines = [
            (kernel.name, f"{kernel.launches:.0f}", f"{kernel.ms:.3f}", f"{kernel.ms / busy:.0%}")
            for kernel in profile.kernels[:most]
        ]
        rest = sum(kernel.ms for kernel in profile.kernels[most:])
        lines.append(("the rest", "", f"{rest:.3f}", f"{rest / busy:.0%}"))
        head = f"{profile.title}: {profile.ms:.2f} ms, kernels {busy:.2f} ms"
        head += f"; the others {profile.power}" if profile.power else ""
        columns = ("kernel", "launches", "ms", "share")
        blocks.append(head + "\n\n" + tabulate(lines, columns, disable_numparse=True))
    return "\n\n".join(blocks)


def _profiled(title: str, work: Callable[[], object], passes: int) -> Profile:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    torch.cuda.synchronize()
    with recorded(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(passes):
            work()
        torch.cuda.synchronize()
    launches = [_launch(event) for event in record.events() if _is_kernel(event)]
    if not launches:
        raise UserError(
            "the profiler recorded no kernel: see that this user may read the GPU's counters."
        )
    start = min(launch.start for launch in launches)
    end = max(launch.start + launch.ms for launch in launches)
    return Profile(title, (end - start) / passes, tuple(summed(launches, passes)))


def _is_kernel(event: Any) -> bool:
    return bool(event.device_type.name == "CUDA")


def _launch(event: Any) -> Launch:
    start, end = event.time_range.start / 1e3, event.time_range.end / 1e3
    return Launch(event.name, start, end - start)
