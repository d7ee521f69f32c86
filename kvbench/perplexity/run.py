"""Every window of a text through every method, one batch of windows after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import UserError
from kvbench.evaluation.environment import environment
from kvbench.evaluation.failures import check_faults, failure
from kvbench.evaluation.hardware import check_available, load
from kvbench.evaluation.lines import Lines
from kvbench.evaluation.session import prepared_methods
from kvbench.evaluation.store import write_run
from kvbench.evaluation.text import Text, Windows, cut, read_text
from kvbench.perplexity.calibration import calibration
from kvbench.perplexity.rows import KIND, Identity, PerplexityRow, Scores, make_row

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.evaluation.progress import Progress
    from kvbench.evaluation.runner import PreparedMethod
    from kvbench.models.load import LoadedModel
    from kvbench.perplexity.request import PerplexityRequest

_UNREAD = (
    "no quantized token was read: the window is no longer than what the method keeps exact; "
    "give a larger --window"
)
_NOT_FINITE = "the model's output is not finite with this cache"


def measure(request: PerplexityRequest, progress: Progress) -> None:
    """Make the rows that the output folder lacks.

    Raises:
        UserError: the text, the model, a method or the folder can't be used; rows so far are kept.
        Mistake: a method's code raised something; its rows say so, and all others are there.
    """
    text = read_text(request.text)
    check_available(request.model)
    with Lines(request.out, KIND) as lines:
        loaded = load(request.model, request.device, request.dtype)
        windows = cut(loaded, text, request.window, request.limit)
        runner = Runner(request, loaded, text, windows, lines, progress)
        write_run(request.out, runner.document())
        count = len(windows.numbers)
        progress.begin(count * len(runner.methods), 0)
        for start in range(0, count, request.batch):
            for protocol in request.protocols:
                runner.run(protocol, range(start, min(start + request.batch, count)))
        check_faults(runner.raised)


@dataclass(frozen=True)
class _Batch:
    """Windows that are read together; `ids` (B, T + 1) are on the model's device."""

    protocol: str
    context: int
    numbers: Sequence[int]
    ids: Tensor

    @property
    def targets(self) -> Tensor:
        """(B, n): true next tokens of the scored positions, of a whole window or past a context."""
        window = self.ids.shape[1] - 1
        return self.ids[:, 1 if self.context == window else self.context :]


class Runner:
    """Runs batches of windows through methods and hands over rows."""

    def __init__(
        self,
        request: PerplexityRequest,
        loaded: LoadedModel,
        text: Text,
        windows: Windows,
        lines: Lines[PerplexityRow],
        progress: Progress,
    ) -> None:
        """Calibrate if a method needs it, and make all methods ready."""
        self._request, self._loaded, self._text, self._windows = request, loaded, text, windows
        self._lines, self._progress = lines, progress
        self.raised: list[tuple[str, str]] = []
        """Methods whose code raised something, and what: a pair a batch."""
        statistics = calibration(request, loaded, text, windows, progress)
        self.methods = prepared_methods(
            loaded, request.methods, request.protocols, statistics, progress
        )
        if not any(method.is_reference for method in self.methods):
            raise UserError("no 16-bit cache to compare with: add fp16 to the methods")

    def document(self) -> dict[str, Any]:
        """What ``run.json`` says."""
        skipped = ("methods", "model")
        plain = {
            field.name: getattr(self._request, field.name)
            for field in dataclasses.fields(self._request)
            if field.name not in skipped
        }
        plain["methods"] = [choice.spec for choice in self._request.methods]
        plain["model"] = self._loaded.entry.name
        plain["windows"] = len(self._windows.numbers)
        plain["calibration_windows"] = len(self._windows.held_out)
        plain["command"] = shlex.join(["kvbench", *sys.argv[1:]])
        plain["version"] = kvbench.__version__
        return {"request": plain, "environment": environment()}

    def run(self, protocol: str, places: range) -> None:
        """Make a batch's missing rows; a batch of which a method lacks one runs as a whole."""
        batch = self._batch(protocol, places)
        methods = [method for method in self.methods if method.protocol == protocol]
        wanted = [method for method in methods if self._lacks(method, batch)]
        for _ in range(len(batch.numbers) * (len(methods) - len(wanted))):
            self._progress.advance()
        if not wanted:
            return
        self._progress.cell(f"{protocol} · window {batch.numbers[0]}")
        # The control's own row comes from a second pass, so that it shows what repeats exactly.
        reference: list[Tensor] | str = self._logits(methods[0], batch)
        for method in wanted:
            self._measure(method, batch, reference)

    def _batch(self, protocol: str, places: range) -> _Batch:
        numbers = [self._windows.numbers[place] for place in places]
        ids = self._windows.scored[places.start : places.stop].to(self._loaded.model.device)
        return _Batch(protocol, self._request.read_at_once(protocol), numbers, ids)

    def _lacks(self, method: PreparedMethod, batch: _Batch) -> bool:
        return not all(
            self._lines.has(identity.row_key()) for identity in self._identities(method, batch)
        )

    def _logits(self, method: PreparedMethod, batch: _Batch) -> list[Tensor] | str:
        """The reference's logits, or why there are none."""
        from kvbench.perplexity.score import forced_logits

        model = self._loaded.model
        try:
            cache = method.new_cache(model)
            return list(forced_logits(model, batch.ids[:, :-1], cache, batch.context))
        except Exception as error:
            status, reason = failure(error)
            if status == "error":
                raise
            return f"the 16-bit reference ran out of memory: {reason}"

    def _measure(
        self, method: PreparedMethod, batch: _Batch, reference: list[Tensor] | str
    ) -> None:
        values: dict[str, Any] = {"status": "oom"}
        scores: Sequence[Scores | None] = [None] * len(batch.numbers)
        usages: Sequence[dict[str, Any]] = [{}] * len(batch.numbers)
        if isinstance(reference, str):
            values["error"] = reference
        else:
            try:
                scores, usages, seconds = self._scored(method, batch, reference)
                values = {"seconds": seconds}
            except Exception as error:
                values["status"], values["error"] = failure(error)
                if values["status"] == "error":
                    self.raised.append((method.spec, values["error"]))
        identities = self._identities(method, batch)
        for identity, score, usage in zip(identities, scores, usages, strict=True):
            self._write(method, identity, score, {**values, **usage})

    def _scored(
        self, method: PreparedMethod, batch: _Batch, reference: list[Tensor]
    ) -> tuple[list[Scores | None], list[dict[str, Any]], float]:
        """Scores and storage of each window, and seconds a window."""
        from kvbench.evaluation.decode import now
        from kvbench.perplexity.score import compare, forced_logits

        model, peer = self._loaded.model, method.peer
        cache, ids, started = method.new_cache(model), batch.ids[:, :-1], now(self._loaded.model)
        split = peer is not None and peer.splits_prompt
        chunks = forced_logits(model, ids, cache, batch.context, split=split)
        scores = compare(chunks, reference, batch.targets)
        seconds = (now(model) - started) / len(ids)
        return scores, _usages(method, model, cache, ids), seconds

    def _write(
        self,
        method: PreparedMethod,
        identity: Identity,
        scores: Scores | None,
        values: dict[str, Any],
    ) -> None:
        """Write a row, if it isn't there; one that never read the method's storage has no score."""
        quantizes = method.bound is not None and not method.is_reference
        if "error" not in values:
            unread = quantizes and not values["packed_tokens_read"]
            if unread or scores is None:
                values |= {"status": "error", "error": _UNREAD if unread else _NOT_FINITE}
                scores = None
        values |= {"storage": method.storage, "quantizes": quantizes}
        row = make_row(identity, scores, **values)
        if row.status != "ok":
            self._progress.note(f"{row.method}, window {row.number}: {row.error}")
        if not self._lines.has(row.key):
            self._lines.append(row)
        self._progress.advance()

    def _identities(self, method: PreparedMethod, batch: _Batch) -> list[Identity]:
        loaded, text, request = self._loaded, self._text, self._request
        return [
            Identity(
                model=loaded.entry.name,
                revision=loaded.revision,
                dtype=str(loaded.model.dtype).removeprefix("torch."),
                method=method.spec,
                protocol=method.protocol,
                text=text.name,
                text_sha256=text.sha256,
                window=request.window,
                context=batch.context,
                number=number,
                tokens_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
                calibration=method.calibration,
                batch=request.batch,
                version=kvbench.__version__,
            )
            for number, ids in zip(batch.numbers, batch.ids.tolist(), strict=True)
        ]


def _usages(method: PreparedMethod, model: Any, cache: Any, ids: Tensor) -> list[dict[str, Any]]:
    """What each window takes in the cache, and what was read of it."""
    from kvbench.cache import QuantizedCache
    from kvbench.evaluation.decode import peer_usage

    if isinstance(cache, QuantizedCache):
        rows: Sequence[Any] = cache.rows()
    else:
        nbytes = method.peer.nbytes(cache)  # type: ignore[union-attr]
        rows = [peer_usage(model, nbytes, *ids.shape)] * len(ids)
    return [
        {
            "cache_bytes": row.nbytes,
            "bits_per_element": row.bits_per_element,
            "packed_tokens_read": row.packed_tokens_read,
        }
        for row in rows
    ]
