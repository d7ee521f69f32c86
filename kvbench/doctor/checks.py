"""What must hold for every method on a model, tried on the model itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, ClassVar

import torch

from kvbench.cache import (
    Affine,
    Calibration,
    ForeignCache,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Side,
    Uniform,
    bind,
    kept_exact,
)
from kvbench.cache.quantized import compose
from kvbench.doctor.findings import NOTHING, Finding, Status
from kvbench.doctor.kernels import path
from kvbench.doctor.probe import Spoken, divergence, long_prompt, prompts, speak
from kvbench.doctor.request import DoctorRequest
from kvbench.errors import Mistake, UserError
from kvbench.evaluation.hardware import is_out_of_memory, load
from kvbench.evaluation.rows import BOTH

if TYPE_CHECKING:
    from kvbench.cache import BoundMethod
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Nats that rounding may put between two ways to compute the same answer."""

_REPORT = "don't use its numbers here; report it with the output of kvbench doctor --json"


@dataclass(frozen=True)
class OneBit:
    """A cache that must ruin every answer: one bit a number, no exact token."""

    label: ClassVar[str] = "1 bit"
    paper: ClassVar[str] = "-"
    needs: ClassVar[Needs] = Needs()

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Keys and values alike."""
        side = Side({1: Affine(1, spec.head_dim)})
        return LayerQuantizer(side, side, Uniform(1))


@dataclass(frozen=True)
class Exactly:
    """A method's transforms, windows and rotary handling with every token exact."""

    inner: KVQuantizer
    label: ClassVar[str] = "exact"
    paper: ClassVar[str] = "-"

    @property
    def needs(self) -> Needs:
        """What the method needs."""
        return self.inner.needs

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """The method's layer under a plan that quantizes nothing."""
        return kept_exact(compose(self.inner, (spec,), calibration)[0])


def model_checks(request: DoctorRequest, entry: ModelEntry) -> Iterator[Finding]:
    """Load a model and try every method on it; a model that can't be loaded is a finding."""
    section, kernels = f"checks on {entry.name}", f"kernels on {entry.name}"
    started = time.perf_counter()
    try:
        patient = _Patient(load(entry, request.device, request.dtype), section)
    except UserError as error:
        yield Finding(section, Status.FAIL, "loading", "the model can't be loaded", str(error))
        return
    seconds = time.perf_counter() - started
    model = patient.loaded.model
    text = f"loaded as {model.dtype} on {model.device} in {seconds:.0f} s"
    yield Finding(kernels, Status.OK, entry.name, text)
    for choice in request.methods:
        yield from patient.path(choice, kernels)
    yield patient.guarded("1-bit cache", patient.destructive)
    for choice in request.methods:
        yield patient.guarded(choice.spec, partial(patient.method, choice))
    seconds = time.perf_counter() - started
    yield Finding(section, Status.OK, "time", f"{seconds:.0f} s in all")


class _Patient:
    """A loaded model and its answer without any of our caches."""

    def __init__(self, loaded: LoadedModel, section: str) -> None:
        self.loaded, self._section = loaded, section
        self._tolerance = TOLERANCE[loaded.model.dtype]

    @cached_property
    def _inputs(self) -> tuple[ModelInputs, ModelInputs]:
        """The long prompt, and both as a padded batch."""
        return long_prompt(self.loaded), prompts(self.loaded)

    @cached_property
    def _plain(self) -> tuple[Spoken, Spoken]:
        """What the model answers to both with plain `generate`."""
        from transformers import DynamicCache

        model = self.loaded.model
        alone, both = (
            speak(model, inputs, DynamicCache(config=model.config)) for inputs in self._inputs
        )
        return alone, both

    @cached_property
    def _statistics(self) -> Calibration:
        """Of the long prompt: enough to see that a method works, not to judge it."""
        from kvbench.cache import calibrate_statistics

        prompt = dict(self._inputs[0].kwargs())
        return calibrate_statistics(self.loaded.model, [prompt], {"data": "doctor"})

    def guarded(self, name: str, check: Callable[[], tuple[Status, str, str]]) -> Finding:
        """Run a check; whatever it raises becomes its finding."""
        try:
            status, text, advice = check()
        except Mistake as error:
            status, text, advice = Status.FAIL, "has a mistake", str(error)
        except UserError as error:
            status, text = Status.NOTE, "can't store this model"
            advice = str(error)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            status, text = Status.FAIL, f"{type(error).__name__}: {reason}"
            advice = "free memory or take --device cpu" if is_out_of_memory(error) else _REPORT
        return Finding(self._section, status, name, text, advice)

    def destructive(self) -> tuple[Status, str, str]:
        """A cache that is written but never read would pass every other comparison."""
        for protocol in BOTH:
            cache = self.bound(OneBit(), protocol).new_cache()
            answer = speak(self.loaded.model, self._inputs[0], cache)
            if not cache.packed_tokens_read:
                return Status.FAIL, f"was never read under {protocol}", _REPORT
            if torch.equal(answer.tokens, self._plain[0].tokens):
                text = f"left the answer as it is under {protocol}"
                return Status.FAIL, text, "the model may not read its cache; " + _REPORT
        return Status.OK, "changes the answer under both protocols", NOTHING

    def method(self, choice: MethodChoice) -> tuple[Status, str, str]:
        """Exact storage must change nothing, quantized storage must be read."""
        method = choice.quantizer
        if isinstance(method, ForeignCache):
            return Status.OK, "transformers' own cache: not checked", NOTHING
        apart = max(self._exactly(method, protocol) for protocol in BOTH)
        if not apart <= self._tolerance:  # NaN, too
            text = f"{apart:.2g} nats from plain generate with every token exact"
            return Status.FAIL, text, f"more than {self._tolerance:g} is no rounding: {_REPORT}"
        told = [f"with every token exact {apart:.1g} nats from plain generate"]
        for protocol in BOTH:
            bound = self.bound(method, protocol)
            quantizes = not all(q.is_exact for q in bound.quantizers)
            fault, text = (self._lossy if quantizes else self._lossless)(bound)
            if fault:
                return Status.FAIL, f"{fault} under {protocol}", _REPORT
            told.append(f"{protocol} {text}")
        return Status.OK, ", ".join(told), NOTHING

    def _lossless(self, bound: BoundMethod) -> tuple[str, str]:
        """Fault and success of storage that quantizes nothing: plain `generate`'s own answer."""
        answer, plain = speak(self.loaded.model, self._inputs[0], bound.new_cache()), self._plain[0]
        apart = divergence(plain, answer)
        same = int((answer.tokens == plain.tokens).sum())
        # Tokens may part at a tie that rounding decides; the distributions may not.
        fault = (
            "" if apart <= self._tolerance else f"quantizes nothing, but is {apart:.2g} nats off"
        )
        return fault, f"{same} of {plain.tokens.numel()} tokens as plain generate"

    def _lossy(self, bound: BoundMethod) -> tuple[str, str]:
        """Fault and success of quantized storage: it is read, and it shows."""
        cache = bound.new_cache()
        answer = speak(self.loaded.model, self._inputs[0], cache)
        apart = divergence(self._plain[0], answer)
        told = f"{apart:.2g} nats at {cache.bits_per_element():.2f} bits"
        if not bool(answer.logits.isfinite().all()):
            return "gives infinite or undefined logits", told
        if not cache.packed_tokens_read:
            return "never read its quantized storage", told
        return "" if apart > 0 else "gives exact logits in spite of quantized storage", told

    def path(self, choice: MethodChoice, section: str) -> Iterator[Finding]:
        """Which kernels the method takes on this model and device."""
        if isinstance(choice.quantizer, ForeignCache):
            yield Finding(section, Status.OK, choice.spec, "transformers' own cache")
            return
        with suppress(UserError):  # `method` tells why the model can't be stored
            yield path(section, choice.spec, self.bound(choice.quantizer, BOTH[0]))

    def bound(self, method: KVQuantizer, protocol: str) -> BoundMethod:
        """A method made ready for the model.

        Raises:
            UserError: It can't store the model's layers.
        """
        return bind(
            self.loaded.model,
            method,
            protocol=protocol,  # type: ignore[arg-type]
            calibration=self._statistics if method.needs.statistics else None,
            text_salient_layers=self.loaded.entry.tsa_layers,
        )

    def _exactly(self, method: KVQuantizer, protocol: str) -> float:
        """Nats between plain `generate` and a method that keeps everything, rows padded."""
        cache = self.bound(Exactly(method), protocol).new_cache()
        return divergence(self._plain[1], speak(self.loaded.model, self._inputs[1], cache))
