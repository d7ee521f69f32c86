"""Texts as windows of tokens: some to score, the last ones to calibrate on."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.models.load import LoadedModel

BUNDLED = "pydoc"
_HELD_OUT_SHARE, _HELD_OUT_MOST = 8, 16


@dataclass(frozen=True)
class Text:
    """A text with a name for tables."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the content in UTF-8, hexadecimal."""
        return hashlib.sha256(self.content.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Windows of T tokens, in the order of the text; no token is in both tensors.

    Attributes:
        numbers: Place of each scored window in the text.
        scored: (N, T + 1) int64: T tokens to read, and the one after them, which is only predicted.
        held_out: (M, T) int64 from the end of the text, for calibration.
    """

    numbers: tuple[int, ...]
    scored: Tensor
    held_out: Tensor


def read_text(name: str) -> Text:
    """Read a UTF-8 file, or ``pydoc``: CPython's own language reference, as every Python has it.

    The topics of `pydoc_data.topics` stand in the order of their names, an empty line between them;
    other releases of Python have other texts, so the name carries the release.

    Raises:
        UserError: The file is missing, empty or no UTF-8.
    """
    if name == BUNDLED:
        from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

        content = "\n\n".join(topics[key] for key in sorted(topics))
        return Text(f"{BUNDLED}-{platform.python_version()}", content)
    path = Path(name).expanduser()
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): convert it") from error
    except OSError as error:
        raise UserError(
            f"can't read the text {path} ({error.strerror or error}): name a file, or {BUNDLED}"
        ) from error
    if not content.strip():
        raise UserError(f"{path} is empty: name a file with text")
    return Text(path.name, content)


def cut(loaded: LoadedModel, text: Text, window: int, limit: int | None) -> Windows:
    """Cut a text into windows of T = `window` tokens and choose those to score.

    The last eighth of the windows (1 to 16 of them) is never scored. Of the others, a limit takes
    windows at equal distances. Every window begins with the tokens that the model's tokenizer puts
    before any text (LLaMA's `<s>`, nothing for SmolLM2).

    Raises:
        UserError: The text has less than two windows, or a window is longer than the model.
    """
    import torch

    if window > loaded.max_positions:
        raise UserError(
            f"--window {window} is more than the {loaded.max_positions} tokens that "
            f"{loaded.entry.name} reads: give fewer"
        )
    start, stream = loaded.tokens.start, loaded.tokens.encode(text.content)
    body = window - len(start)
    count = (len(stream) - 1) // body
    if count < 2:
        raise UserError(
            f"{text.name} has {len(stream)} tokens, but two windows of {window} are needed, one to "
            "score and one held out: give a longer text or a smaller --window"
        )
    held = max(1, min(_HELD_OUT_MOST, count // _HELD_OUT_SHARE))
    numbers = _spread(count - held, limit)
    scored = [start + stream[n * body : (n + 1) * body + 1] for n in numbers]
    ends = range(len(stream) - (held - 1) * body, len(stream) + 1, body)
    held_out = [start + stream[end - body : end] for end in ends]
    return Windows(numbers, torch.tensor(scored), torch.tensor(held_out))


def _spread(count: int, limit: int | None) -> tuple[int, ...]:
    """So many of `count` numbers, at equal distances from 0 on."""
    if limit is None or limit >= count:
        return tuple(range(count))
    return tuple(index * count // limit for index in range(limit))
