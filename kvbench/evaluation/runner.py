"""One batch of samples through every method, and the rows that come of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, Protocol

import kvbench
from kvbench.evaluation.decode import Answer, Answers, Generation, answer
from kvbench.evaluation.failures import failure
from kvbench.evaluation.progress import Progress
from kvbench.evaluation.rows import SCHEMA, SampleRow, row_key
from kvbench.evaluation.samples import Cell, Question, encoded
from kvbench.registry import MODELS

if TYPE_CHECKING:
    from transformers import Cache

    from kvbench.cache import BoundMethod, Calibration, ForeignCache
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.inputs import ModelInputs
    from kvbench.models.load import LoadedModel
    from kvbench.models.zoo import ModelEntry

MILEBENCH_TOKENS, GENERATED_TOKENS = 512, 16
"""Longest answer: MileBench's official number; generated tasks ask for a few words."""


@dataclass(frozen=True)
class PreparedMethod:
    """A method bound to a model and a protocol; `bound` is None for a peer's own cache."""

    spec: str
    protocol: str
    choice: MethodChoice
    bound: BoundMethod | None
    calibration: str

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        choice: MethodChoice,
        protocol: str,
        calibration: Calibration | None,
    ) -> PreparedMethod:
        """Bind a method.

        Raises:
            UserError: the method can't store this model's layers, or can't follow the protocol.
        """
        from kvbench.cache import ForeignCache, bind

        method = choice.quantizer
        if isinstance(method, ForeignCache):
            method.cache(loaded.model, protocol)  # type: ignore[arg-type]
            return cls(choice.spec, protocol, choice, None, "")
        names = method.needs.statistics
        # A file may hold more: what another method needs must not change this one's rows.
        needed = calibration.only(names) if calibration and names else None
        bound = bind(
            loaded.model,
            method,
            protocol=protocol,  # type: ignore[arg-type]
            calibration=needed,
            text_salient_layers=loaded.entry.tsa_layers,
        )
        made_with = ",".join(filter(None, (_fingerprint(needed), _found_layers(loaded.entry))))
        return cls(choice.spec, protocol, choice, bound, made_with)

    @property
    def is_reference(self) -> bool:
        """Whether nothing is quantized: what every other method is held against."""
        return self.bound is not None and all(q.is_exact for q in self.bound.quantizers)

    @property
    def storage(self) -> str:
        """How the row's bytes are to be understood."""
        return "packed" if self.bound else "foreign"

    def new_cache(self, model: Any) -> Cache:
        """An empty cache."""
        if self.bound is not None:
            return self.bound.new_cache()
        return self.choice.quantizer.cache(model, self.protocol)  # type: ignore[union-attr, arg-type]

    @property
    def peer(self) -> ForeignCache | None:
        """Whose cache it is, if it isn't ours."""
        return None if self.bound else self.choice.quantizer  # type: ignore[return-value]


@dataclass(frozen=True)
class _Batch:
    """Questions that are answered together."""

    loaded: LoadedModel
    questions: Sequence[Question]

    @cached_property
    def inputs(self) -> ModelInputs:
        """The same for every method, so images are opened and prepared once."""
        return encoded(self.loaded, self.questions)


class Sink(Protocol):
    """Where rows go."""

    def has(self, key: str) -> bool:
        """Whether a row needs no run."""

    def append(self, row: SampleRow) -> bool:
        """Keep a row."""


class BatchRunner:
    """Runs a batch of one task; hands over a row as soon as a method has answered.

    `batch` is how many samples a full batch has: it is part of every row's identity.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        cell: Cell,
        methods: Sequence[PreparedMethod],
        sink: Sink,
        progress: Progress,
        batch: int,
        max_new_tokens: int | None,
    ) -> None:
        """Keep what every batch needs."""
        self._loaded, self._cell, self._methods = loaded, cell, methods
        self._store, self._progress, self._batch = sink, progress, batch
        default = MILEBENCH_TOKENS if cell.dataset == "milebench" else GENERATED_TOKENS
        self._generation = Generation(max_new_tokens or default)

    def run(self, questions: Sequence[Question]) -> None:
        """Answer what the store lacks of this batch.

        A batch with a row missing runs as a whole, so that a row is the same whether its run was
        cut short or not, to the last bit; and the 16-bit cache runs along to be measured against.
        """
        lacking = [
            [question for question in questions if not self._store.has(self._key(method, question))]
            for method in self._methods
        ]
        for _ in range(len(questions) * len(lacking) - sum(map(len, lacking))):
            self._progress.advance()
        wanted = [method for method, some in zip(self._methods, lacking, strict=True) if some]
        batch = _Batch(self._loaded, questions)
        for protocol in dict.fromkeys(method.protocol for method in wanted):
            references: Sequence[Answer] | None = None
            for method in self._methods:
                if method.protocol != protocol:
                    continue
                if method.is_reference:
                    references = self._answer(method, batch, None)
                elif method in wanted:
                    self._answer(method, batch, references)

    def _answer(
        self,
        method: PreparedMethod,
        batch: _Batch,
        references: Sequence[Answer] | None,
    ) -> Sequence[Answer] | None:
        """A batch's answers, their rows written; None when the method failed, which is written too.

        Where the 16-bit cache fails, but for want of memory, it's no method's fault.
        """
        try:
            answers = self._generate(method, batch.inputs, references)
        except Exception as error:
            # The error's traceback holds the batch's tensors, so nothing else runs in this block.
            status, reason = failure(error)
            if method.is_reference and status == "error":
                raise
        else:
            self._write_answers(method, batch, answers, references)
            return answers.rows
        for question in batch.questions:
            self._progress.note(f"{method.spec}, sample {question.sample.sample_id}: {reason}")
            self._write(self._failed(method, question, status, reason))
        return None

    def _write_answers(
        self,
        method: PreparedMethod,
        batch: _Batch,
        answers: Answers,
        references: Sequence[Answer] | None,
    ) -> None:
        size = len(batch.questions)
        seconds = {name: value / size for name, value in answers.seconds.items()}
        for place, question in enumerate(batch.questions):
            reference = None if references is None else references[place]
            row, tokens = answers.rows[place], batch.inputs.prompt_tokens[place]
            self._write(self._answered(method, question, row, reference, tokens, seconds))

    def _generate(
        self,
        method: PreparedMethod,
        inputs: ModelInputs,
        references: Sequence[Answer] | None,
    ) -> Answers:
        model = self._loaded.model
        cache = method.new_cache(model)
        return answer(model, inputs, cache, self._generation, references, method.peer)

    def _key(self, method: PreparedMethod, question: Question) -> str:
        return row_key(**self._identity(method, question))

    def _identity(self, method: PreparedMethod, question: Question) -> dict[str, Any]:
        """Everything that could change the answer."""
        return {
            "model": self._loaded.entry.name,
            "revision": self._loaded.revision,
            "dtype": str(self._loaded.model.dtype).removeprefix("torch."),
            "method": method.spec,
            "protocol": method.protocol,
            "dataset": self._cell.dataset,
            "task": self._cell.task.name,
            "task_version": self._cell.task.version,
            "sample_id": question.sample.sample_id,
            "prompt_style": self._loaded.prompt_label,
            "prompt_sha256": question.prompt_sha256,
            "images_sha256": question.images_sha256,
            "generation": self._generation.row(),
            "calibration": method.calibration,
            "batch": self._batch,
            "version": kvbench.__version__,
        }

    def _answered(
        self,
        method: PreparedMethod,
        question: Question,
        row: Answer,
        reference: Answer | None,
        prompt_tokens: int,
        seconds: dict[str, float],
    ) -> SampleRow:
        text = self._text(row)
        score = question.score(text)
        usage = row.usage
        return self._row(
            method,
            question,
            status="ok",
            answer=text,
            extracted=score.extracted,
            correct=score.correct,
            strict=score.strict,
            empty=score.empty,
            unparsable=score.unparsable,
            prompt_tokens=prompt_tokens,
            generated_tokens=len(row.ids),
            cache_bytes=usage.nbytes if usage else None,
            bits_per_element=usage.bits_per_element if usage else None,
            packed_tokens_read=usage.packed_tokens_read if usage else None,
            kl_first=row.divergences[0] if row.divergences else None,
            kl_mean=_mean_divergence(row, reference),
            agrees=None if reference is None else text == self._text(reference),
            seconds=seconds,
        )

    def _failed(
        self, method: PreparedMethod, question: Question, status: str, error: str
    ) -> SampleRow:
        return self._row(method, question, status=status, error=error)

    def _row(self, method: PreparedMethod, question: Question, **values: Any) -> SampleRow:
        identity = self._identity(method, question)
        empty = dict.fromkeys(_OPTIONAL)
        counts: dict[str, Any] = {"prompt_tokens": 0, "generated_tokens": 0, "seconds": {}}
        return SampleRow(
            **{
                "schema": SCHEMA,
                "key": row_key(**identity),
                "storage": method.storage,
                "images_kept": len(question.prompt.images),
                "images_total": question.prompt.images_total,
                "truncated": question.prompt.truncated,
                **identity,
                **empty,
                **counts,
                **values,
            }
        )

    def _text(self, row: Answer) -> str:
        decoded: str = self._loaded.tokenizer.decode(row.ids, skip_special_tokens=True)
        return decoded.strip()

    def _write(self, row: SampleRow) -> None:
        if not self._store.has(row.key):
            self._store.append(row)
            self._progress.advance()


_OPTIONAL = (
    "error",
    "answer",
    "extracted",
    "correct",
    "strict",
    "empty",
    "unparsable",
    "cache_bytes",
    "bits_per_element",
    "packed_tokens_read",
    "kl_first",
    "kl_mean",
    "agrees",
)


def _mean_divergence(row: Answer, reference: Answer | None) -> float | None:
    """Mean over the reference's positions, if all of them were compared."""
    if reference is None or len(row.divergences) < len(reference.log_probs):
        return None
    return fmean(row.divergences) if row.divergences else None


def _found_layers(entry: ModelEntry) -> str:
    """Text-salient layers that aren't the zoo's own: methods are built with them."""
    default = MODELS.get(entry.name).tsa_layers if entry.name in MODELS.names() else ()
    return "" if entry.tsa_layers == default else f"tsa={'-'.join(map(str, entry.tsa_layers))}"


def _fingerprint(calibration: Calibration | None) -> str:
    """Twelve hex digits of a calibration's numbers and origin."""
    if calibration is None:
        return ""
    digest = hashlib.sha256(json.dumps(dict(calibration.manifest), sort_keys=True).encode())
    for name in sorted(calibration.statistics):
        digest.update(calibration.statistics[name].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
