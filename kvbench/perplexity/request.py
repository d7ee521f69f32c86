"""What a run is asked to do, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError
from kvbench.evaluation.request import at_least, check_folders, check_hardware

if TYPE_CHECKING:
    from kvbench.evaluation.choices import MethodChoice
    from kvbench.models.zoo import ModelEntry

_ONE_PASS = "quantized_prefill"


@dataclass(frozen=True)
class PerplexityRequest:
    """Methods on windows of one text, and where their rows go.

    Attributes:
        methods: Methods, each once, with the 16-bit cache that they are held against.
        model: Entry of the zoo or of a local folder.
        protocols: Under ``quantized_prefill`` a window is read at once and every position is
            scored. Under all others its context is the prompt, read at once, and the rest comes
            token by token, as answers are generated; what follows the context is scored.
        out: Folder of the rows; a folder with rows is continued.
        text: A UTF-8 file, or the name of a bundled text.
        limit: At most so many windows, at equal distances in the text; None is all.
        window: Tokens of a window.
        context: Tokens of a window that protocols other than ``quantized_prefill`` read at once.
        batch: Windows that are read together.
        device: "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N".
        dtype: Type of weights and activations; "auto" is the model entry's own.

    Raises:
        UserError: A value is out of range.
    """

    methods: tuple[MethodChoice, ...]
    model: ModelEntry
    protocols: tuple[str, ...]
    out: Path
    text: str
    limit: int | None
    window: int
    context: int
    batch: int
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Check everything that needs no heavy import."""
        if not self.methods or not self.protocols:
            raise UserError("nothing to measure: name at least one method and one protocol")
        smallest = (("limit", 1), ("window", 4), ("context", 2), ("batch", 1))
        for name, least in smallest:
            at_least(name, getattr(self, name), least)
        stepwise = set(self.protocols) - {_ONE_PASS}
        if self.context >= self.window and stepwise:
            raise UserError(
                f"--context {self.context} leaves nothing of a window of {self.window} tokens to "
                "read token by token: give a smaller --context or a larger --window"
            )
        check_hardware(self.device, self.dtype)
        check_folders(self.out, None)

    def read_at_once(self, protocol: str) -> int:
        """Tokens of a window that the model reads in one pass."""
        return self.window if protocol == _ONE_PASS else self.context
