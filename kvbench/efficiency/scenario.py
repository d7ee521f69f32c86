"""What to measure: scenarios, the conditions they share, and the setting that both make."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import kvbench
from kvbench.cache import ForeignCache
from kvbench.efficiency.nvml import visible_device
from kvbench.efficiency.profiles import Target
from kvbench.efficiency.prompts import tokens_per_image, whole_images
from kvbench.efficiency.rows import Setting
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError
from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.hardware import check_available
from kvbench.evaluation.request import DTYPES
from kvbench.models.architectures import configuration
from kvbench.models.find import find_model
from kvbench.models.folders import checkpoint_folder, fingerprint
from kvbench.models.zoo import ModelEntry
from kvbench.registry import MODELS, split_specs
from kvbench.specs import suggestion

_PREFILL_TOKENS = 9600
LARGEST = "largest"
_PACKAGES = ("torch", "transformers", "triton", "optimum-quanto")
# What decides how a try goes; of this part, all but the modules around it.
_MEASURED = ("cache", "efficiency", "kernels", "methods", "models")
_AROUND = {
    *("bench", "capacity", "isolate", "plan", "preset", "profiles", "rows", "run", "scenario"),
    *("search", "span_sweep", "step_profile"),
}


@dataclass(frozen=True)
class Scenario:
    """One row to be.

    Attributes:
        model: As typed: name, or name=/folder.
        method: Name and parameters.
        input_tokens: Of a prompt.
        output_tokens: Of an answer.
        vision_tokens: Of a prompt; None: as many whole images as leave room for some text.
        batch: Rows; None: search the largest batch that completes.
    """

    model: str
    method: str
    input_tokens: int = 600
    output_tokens: int = 512
    vision_tokens: int | None = None
    batch: int | None = None

    @property
    def label(self) -> str:
        """For progress."""
        rows = "largest batch" if self.batch is None else f"batch {self.batch}"
        tokens = f"{self.input_tokens} in, {self.output_tokens} out"
        return f"{self.model} · {self.method} · {tokens} · {rows}"


@dataclass(frozen=True)
class Conditions:
    """What all scenarios of a run share.

    Attributes:
        target: The card.
        out: Folder of the rows; a folder with rows is continued.
        dtype: Of weights and activations; "auto" is the model entry's own.
        seed: Of random weights and prompts.
        prefill_rows: Prompts that the engine runs at a time; None: as many as have about 9,600
            tokens, which keep a GPU busy, while their activations stay small beside the weights.
        timeout: Seconds for one try.
        minutes: After them the run stops with what it has; None: it takes what it takes.
        tolerance: The largest batch is found to this share of itself.

    Raises:
        UserError: A value is out of range.
    """

    target: Target
    out: Path
    dtype: str = "auto"
    seed: int = 0
    prefill_rows: int | None = None
    timeout: float = 600.0
    minutes: float | None = None
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        """Check everything."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"unknown dtype {self.dtype!r}: {suggestion(self.dtype, DTYPES, 'use one of')}"
            )
        if self.seed < 0 or (self.prefill_rows is not None and self.prefill_rows < 1):
            raise UserError("--seed must be at least 0 and --prefill-rows at least 1: correct them")
        if self.timeout <= 0 or (self.minutes is not None and self.minutes <= 0):
            raise UserError("--timeout and --minutes must be above 0: give more time")
        if not 0 <= self.tolerance < 1:
            raise UserError(f"--tolerance is {self.tolerance}: give a share from 0 to below 1")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"output folder {self.out} is a file: choose another folder")


def grid(
    models: str, methods: str, batches: Sequence[int | None] = (None,), **tokens: int
) -> list[Scenario]:
    """Every model with every method at every batch; `tokens` are fields of `Scenario`.

    Raises:
        UserError: A model or method is unknown.
    """
    texts = [name for item in split_specs(models) for name in _named(item)]
    specs = [choice.spec for choice in choose_methods(methods)]
    for text in texts:
        find_model(text)
    return [
        Scenario(text, spec, batch=batch, **tokens)
        for text in dict.fromkeys(texts)
        for batch in batches
        for spec in specs
    ]


def read_batches(text: str) -> list[int | None]:
    """Read ``"8,64,largest"``; None stands for the largest.

    Raises:
        UserError: A part is neither a whole number from 1 nor that word.
    """
    found: dict[int | None, None] = {}
    for part in text.split(","):
        word = part.strip()
        if word != LARGEST and not (word.isdecimal() and int(word)):
            raise UserError(f"--batch has {word!r}: give numbers from 1, or {LARGEST}")
        found[None if word == LARGEST else int(word)] = None
    return list(found)


def setting(scenario: Scenario, conditions: Conditions) -> Setting:
    """What the scenario's row says of how it came about.

    Raises:
        UserError: The scenario can't be run: a model, a method or a number of tokens is wrong.
    """
    entry, (method,) = find_model(scenario.model), choose_methods(scenario.method)
    workload = workload_of(scenario, entry)
    target = conditions.target
    measured = target.device is not None
    foreign = isinstance(method.quantizer, ForeignCache)
    return Setting(
        model=entry.name,
        model_label=entry.label,
        revision=_revision(entry) if measured else "shapes",
        method=method.spec,
        label=method.quantizer.label,
        runner="generate" if foreign else "engine",
        protocol="exact_prefill",
        dtype=entry.dtype if conditions.dtype == "auto" else conditions.dtype,
        input_tokens=workload.input_tokens,
        vision_tokens=workload.vision_tokens,
        output_tokens=workload.output_tokens,
        fixed_batch=scenario.batch,
        prefill_rows=conditions.prefill_rows or prompts_at_once(workload.input_tokens),
        seed=conditions.seed,
        gpu=target.profile.name,
        gpu_label=target.profile.label,
        memory=("measured" if target.limit is None else "emulated") if measured else "modelled",
        memory_limit=target.limit,
        device=target.device or "",
        code=code_fingerprint(type(method.quantizer).__module__),
        versions=versions(),
    )


def _named(item: str) -> Iterable[str]:
    return MODELS.names() if item == "all" else [item]


def prompts_at_once(input_tokens: int) -> int:
    """Prompts of a micro-batch: enough to keep a GPU busy, with small activations."""
    return max(1, _PREFILL_TOKENS // input_tokens)


def workload_of(scenario: Scenario, entry: ModelEntry) -> Workload:
    """The scenario's tokens and rows; one row where the largest batch is asked for.

    Raises:
        UserError: The model can't have these vision tokens.
    """
    config = configuration(entry)
    vision, each = scenario.vision_tokens, tokens_per_image(config)
    if vision is None:
        vision = whole_images(config, scenario.input_tokens)
    elif vision and not each:
        raise UserError(f"{entry.name} takes no images: use --vision-tokens 0")
    elif vision % max(each, 1):
        raise UserError(
            f"{vision} vision tokens aren't whole images of {each} tokens: give a multiple of that"
        )
    batch = 1 if scenario.batch is None else scenario.batch
    return Workload(scenario.input_tokens, vision, scenario.output_tokens, batch)


def _revision(entry: ModelEntry) -> str:
    """Of real weights where there are any; a folder that is named must have them."""
    if entry.folder is None and entry.loader is not None:
        return "bundled"
    try:
        check_available(entry)
    except UserError:
        if entry.folder is not None:
            raise
        return "random"
    return fingerprint(checkpoint_folder(entry))


@cache
def versions() -> dict[str, str | None]:
    """What a try depends on besides kvbench's code; None: not installed."""
    card = visible_device()
    found: dict[str, str | None] = {"kvbench": kvbench.__version__}
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "driver": card.driver if card else None}


@cache
def code_fingerprint(plugin: str = "kvbench") -> str:
    """The first 16 hex digits of SHA-256 over the sources that a try runs.

    Args:
        plugin: Module of the method; its file counts too where it isn't kvbench's own.
    """
    digest = hashlib.sha256()
    if plugin.partition(".")[0] != "kvbench":
        source = sys.modules[plugin].__file__
        digest.update(Path(source).read_bytes() if source else b"")
    for part in _MEASURED:
        spec = importlib.util.find_spec(f"kvbench.{part}")
        for folder in sorted(spec.submodule_search_locations or () if spec else ()):
            for file in sorted(Path(folder).rglob("*.py")):
                if part != "efficiency" or file.stem not in _AROUND:
                    digest.update(f"{part}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
