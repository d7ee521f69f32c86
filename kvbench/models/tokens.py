"""Text to token ids and back, exactly as SentencePiece does it for LLaMA's tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class TextTokens:
    """Tokenizes pieces of text without special tokens.

    SentencePiece puts a blank before every text. transformers' LLaMA tokenizer does so only where
    there is none yet, so a text that begins with a blank, as text behind an image mostly does,
    loses a token, and decoding its ids loses the blank.
    """

    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens."""
        if self._swallows_blank and text.startswith(" "):
            text = "▁" + text  # the blank as the vocabulary writes it, which then counts as given
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens and blanks included."""
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    @cached_property
    def start(self) -> list[int]:
        """The beginning-of-sequence id if the tokenizer puts it before a prompt, else nothing."""
        bos = self.tokenizer.bos_token_id
        return [bos] if self.tokenizer("")["input_ids"][:1] == [bos] else []

    @cached_property
    def _swallows_blank(self) -> bool:
        one, other = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a", " a"))
        return bool(one == other)
