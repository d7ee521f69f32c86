"""Small requests on a tiny LLaMA and a text of our own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.evaluation import choices
from kvbench.evaluation.progress import Silent
from kvbench.perplexity.request import PerplexityRequest
from kvbench.perplexity.rows import PerplexityRow, read_perplexity
from kvbench.perplexity.run import measure

WORDS = "the|cache|of|a|model|keeps|keys|and|values|for|every|token|that|it|has|read"


class Listener(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.total = self.advanced = 0
        self.notes: list[str] = []

    def begin(self, total: int, done: int) -> None:
        self.total = total

    def advance(self) -> None:
        self.advanced += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 bytes, a token each for the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    chosen = random.Random(0).choices(WORDS.split("|"), k=800)
    path.write_text(" ".join(chosen)[:1600], encoding="utf-8")
    return path


@pytest.fixture
def asked(text_file: Path, tiny_text_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """A request; methods as typed, the 16-bit cache always among them."""

    def make(methods: str = "rtn_int2", **changes: Any) -> PerplexityRequest:
        fields: dict[str, Any] = {
            "methods": choices.choose_methods(f"fp16,{methods}"),
            "model": choices.choose_models(f"tiny={tiny_text_folder}")[0],
            "protocols": ("quantized_prefill",),
            "out": tmp_path / "run",
            "text": str(text_file),
            "limit": 3,
            "window": 64,
            "context": 48,
            "batch": 2,
            "device": "cpu",
        }
        return PerplexityRequest(**fields | changes)

    return make


@pytest.fixture
def measured(asked: Callable[..., Any]) -> Callable[..., list[PerplexityRow]]:
    """Runs a request of `asked` and returns its rows in the order of the file."""

    def run(methods: str = "rtn_int2", progress: Any = None, **changes: Any) -> list[PerplexityRow]:
        request = asked(methods, **changes)
        measure(request, progress or Silent())
        return read_perplexity(request.out)

    return run
