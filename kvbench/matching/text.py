"""A text's windows as what settings are measured on and compared by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.request import at_least
from kvbench.matching.evaluations import Ground, evenly
from kvbench.perplexity.request import PerplexityRequest

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.evaluation.choices import MethodChoice
    from kvbench.evaluation.progress import Progress
    from kvbench.matching.measure import Prompt
    from kvbench.models.zoo import ModelEntry


@dataclass(frozen=True)
class OnText:
    """`kvbench perplexity` of matched settings.

    Attributes:
        request: Model, methods, text and the rest, under one protocol.
        samples: Windows to measure storage with, at equal distances among those that are scored.

    Raises:
        UserError: A value is out of range, or there are several protocols.
    """

    request: PerplexityRequest
    samples: int = 4

    def __post_init__(self) -> None:
        """Check what the request doesn't."""
        at_least("samples", self.samples, 1)
        if len(self.request.protocols) != 1:
            raise UserError(
                "--bits finds settings for one protocol: give --protocol quantized_prefill or "
                "--protocol exact_prefill"
            )

    @property
    def methods(self) -> tuple[MethodChoice, ...]:
        """Methods to bring to a size."""
        return self.request.methods

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The one model."""
        return (self.request.model,)

    @property
    def out(self) -> Path:
        """Folder of the rows."""
        return self.request.out

    @property
    def rows(self) -> str:
        """Name of the rows' file."""
        from kvbench.perplexity.rows import ROWS

        return ROWS

    def ground(self, entry: ModelEntry, progress: Progress) -> Ground:
        """The model and a few windows."""
        from kvbench.evaluation.hardware import load
        from kvbench.evaluation.text import cut, read_text
        from kvbench.perplexity.calibration import calibration

        request, [protocol] = self.request, self.request.protocols
        text = read_text(request.text)
        loaded = load(entry, request.device, request.dtype)
        windows = cut(loaded, text, request.window, request.limit)
        statistics = calibration(request, loaded, text, windows, progress)
        chosen = windows.scored[evenly(len(windows.scored), self.samples), :-1]
        at_once = request.read_at_once(protocol)
        conditions: dict[str, str | int] = {
            "protocol": protocol,
            "text_sha256": text.sha256,
            "window": request.window,
            "context": at_once,
        }
        prompts = [_prompt(text.name, ids[None], at_once) for ids in chosen.to(loaded.model.device)]
        return Ground(loaded, statistics, prompts, conditions)

    def run(self, entry: ModelEntry, methods: tuple[MethodChoice, ...], progress: Progress) -> None:
        """Score the windows."""
        from kvbench.perplexity.run import measure

        measure(replace(self.request, model=entry, methods=methods), progress)


def _prompt(text: str, ids: Tensor, at_once: int) -> Prompt:
    """A window (1, T), of which the model reads the first tokens at once."""
    import torch

    from kvbench.matching.measure import Prompt
    from kvbench.models.inputs import ModelInputs

    mask = torch.ones_like(ids)
    return Prompt(text, ModelInputs(ids, mask, mask == 0, (ids.shape[1],)), at_once)
