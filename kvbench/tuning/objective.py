"""How much of the 16-bit cache's answers a table keeps, on prompts that no task scores."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kvbench.cache import bind
from kvbench.defaults import REFERENCE
from kvbench.evaluation.decode import Answer, Generation, answer

if TYPE_CHECKING:
    from kvbench.evaluation.samples import Question
    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel


@dataclass(frozen=True)
class Outcome:
    """Means over the prompts; `kl` is KL(fp16 || method) in nats, under teacher forcing."""

    kl: float
    accuracy: float


class Judge:
    """Answers the prompts with a method and holds them against the 16-bit cache's answers."""

    def __init__(
        self,
        loaded: LoadedModel,
        questions: Sequence[Question],
        inputs: Sequence[ModelInputs],
        protocol: str,
        max_new_tokens: int,
    ) -> None:
        """Answer everything with the 16-bit cache."""
        self._loaded, self._protocol = loaded, protocol
        self._questions, self._inputs = questions, inputs
        self._generation = Generation(max_new_tokens)
        self._references: Sequence[Answer | None] = [None] * len(inputs)
        self._references = self._answers(REFERENCE)

    def outcome(self, method: Any) -> Outcome:
        """Run the model with a method."""
        answers = self._answers(method)
        kl = fmean(fmean(one.divergences) for one in answers)
        return Outcome(kl, self._accuracy(answers))

    @property
    def reference(self) -> Outcome:
        """The 16-bit cache's own."""
        return Outcome(0.0, self._accuracy([one for one in self._references if one is not None]))

    def _accuracy(self, answers: Sequence[Answer]) -> float:
        decode = self._loaded.tokenizer.decode
        texts = (decode(one.ids, skip_special_tokens=True).strip() for one in answers)
        return fmean(q.score(text).correct for q, text in zip(self._questions, texts, strict=True))

    def _answers(self, method: Any) -> list[Answer]:
        from kvbench.models.vision import shared_vision

        model = self._loaded.model
        bound = bind(
            model,
            method,
            protocol=self._protocol,  # type: ignore[arg-type]
            text_salient_layers=self._loaded.entry.tsa_layers,
        )
        found = []
        with ExitStack() as stack:
            stack.enter_context(shared_vision(model))
            for inputs, reference in zip(self._inputs, self._references, strict=True):
                mine = None if reference is None else [reference]
                found += answer(model, inputs, bound.new_cache(), self._generation, mine).rows
        return found
