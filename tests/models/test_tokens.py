from __future__ import annotations

import pytest

from kvbench.models.tokens import TextTokens

# SentencePiece with its dummy prefix: one `▁` (5) before the text, then its own blanks.
SENTENCEPIECE = {
    "a": [5, 6],
    " a": [5, 5, 6],
    "  a": [5, 5, 5, 6],
    "a b": [5, 6, 5, 7],
    "\na": [5, 8, 6],
    " ": [5, 5],
    "": [],
}


@pytest.mark.parametrize("text", SENTENCEPIECE)
def test_ids_are_those_of_sentencepiece(sentencepiece_like, text: str) -> None:
    assert TextTokens(sentencepiece_like).encode(text) == SENTENCEPIECE[text]


@pytest.mark.parametrize("text", [t for t in SENTENCEPIECE if t])
def test_decoding_gives_the_text_back(sentencepiece_like, text: str) -> None:
    tokens = TextTokens(sentencepiece_like)
    assert tokens.decode(tokens.encode(text)) == text


@pytest.mark.parametrize("text", ["a", " a b", "  ", "Größe\n , . ", ""])
def test_byte_level_tokenizers_are_left_as_they_are(tiny_tokenizer, text: str) -> None:
    tokens = TextTokens(tiny_tokenizer)
    assert tokens.encode(text) == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokens.decode(tokens.encode(text)) == text


def test_start(tiny_tokenizer, sentencepiece_like) -> None:
    assert TextTokens(tiny_tokenizer).start == [1]
    assert TextTokens(sentencepiece_like).start == []
