"""Texts and how they are cut into windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.evaluation.text import Text, cut, read_text
from kvbench.models.find import find_model
from kvbench.models.load import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(tiny_text_folder: Path) -> LoadedModel:
    return load_model(find_model(f"tiny={tiny_text_folder}"))


def letters(count: int) -> Text:
    """A token each for the tiny tokenizer; no two windows of 9 are alike."""
    return Text("letters", "".join(chr(33 + (i * i + i // 7) % 90) for i in range(count)))


@pytest.mark.parametrize(("count", "held"), [(17, 1), (30, 1), (400, 6), (2000, 16)])
def test_windows_and_what_is_held_out(loaded: LoadedModel, count: int, held: int) -> None:
    windows = cut(loaded, letters(count), 9, None)
    stream = loaded.tokens.encode(letters(count).content)
    assert windows.held_out.shape == (held, 9)
    assert windows.scored.shape == ((count - 1) // 8 - held, 10)
    assert {row[0] for row in (*windows.scored.tolist(), *windows.held_out.tolist())} == {1}
    for number, row in zip(windows.numbers, windows.scored.tolist(), strict=True):
        assert row[1:] == stream[8 * number : 8 * number + 9]
    held_tokens = [token for row in windows.held_out.tolist() for token in row[1:]]
    assert held_tokens == stream[-8 * held :]
    assert len(windows.numbers) * 8 + 1 <= count - 8 * held  # not even a target is shared


def test_a_limit_takes_windows_at_equal_distances(loaded: LoadedModel) -> None:
    text = letters(400)  # 49 windows, 6 held out
    assert cut(loaded, text, 9, 4).numbers == (0, 10, 21, 32)
    assert cut(loaded, text, 9, 43).numbers == cut(loaded, text, 9, 1000).numbers


def test_too_short(loaded: LoadedModel) -> None:
    with pytest.raises(UserError, match="has 16 tokens, but two windows of 9"):
        cut(loaded, letters(16), 9, None)


def test_pythons_own_text() -> None:
    text = read_text("pydoc")
    assert text == read_text("pydoc") and text.name.startswith("pydoc-3.")
    assert len(text.content) > 300_000 and text.content.startswith('The "assert" statement')


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"\xff\xfe\x00", "is no UTF-8 text")],
)
def test_files_that_hold_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(str(tmp_path / "x.txt"))


def test_no_file(tmp_path: Path) -> None:
    for name in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(UserError, match="can't read the text"):
            read_text(str(name))
