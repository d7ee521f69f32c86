"""Other libraries' caches in an evaluation: prompts in two parts, bytes, rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DynamicCache

from kvbench.evaluation.choices import choose_methods
from kvbench.evaluation.decode import Generation, answer
from kvbench.evaluation.progress import Silent
from kvbench.evaluation.request import EvalRequest
from kvbench.evaluation.run import evaluate
from kvbench.evaluation.store import read_rows
from kvbench.models.find import find_model
from kvbench.models.inputs import ModelInputs, batch, encode
from kvbench.models.load import load_model

TEXTS = ["One <ImageHere> two <ImageHere> what is shown?", "<ImageHere> and here?"]


class Exact:
    """transformers' own 16-bit cache as a peer."""

    label: ClassVar[str] = "exact"
    paper: ClassVar[str] = "-"

    def __init__(self, splits_prompt: bool) -> None:
        self.splits_prompt = splits_prompt
        self.concatenates = False

    def cache(self, model: Any, protocol: str) -> DynamicCache:
        return DynamicCache(config=model.config)

    def nbytes(self, cache: DynamicCache) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Forgetful(Exact):
    """Gives a prompt back as it came and stores zeros of it."""

    def cache(self, model: Any, protocol: str) -> DynamicCache:
        cache = super().cache(model, protocol)
        for layer in cache.layers:
            layer.update = self._forgets(layer)
        return cache

    @staticmethod
    def _forgets(layer: Any) -> Any:
        inherited = layer.update

        def update(keys: torch.Tensor, values: torch.Tensor, *more: Any, **options: Any) -> Any:
            if layer.is_initialized:
                return inherited(keys, values, *more, **options)
            inherited(keys * 0, values * 0, *more, **options)
            return keys, values

        return update


def prompts(folder: Path, texts: list[str] = TEXTS) -> tuple[Any, ModelInputs]:
    """A tiny model and a left-padded batch of prompts with 56-pixel noise for images."""
    loaded = load_model(find_model(f"tiny={folder}"))
    noise = np.random.default_rng(0)

    def encoded(text: str) -> ModelInputs:
        pixels = noise.integers(0, 256, (text.count("<ImageHere>"), 56, 56, 3), dtype=np.uint8)
        return encode(loaded, text, [Image.fromarray(image) for image in pixels])

    return loaded.model, batch([encoded(text) for text in texts], loaded.pad_id)


@pytest.fixture(params=["llava", "llava_next", "qwen2_vl"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}_folder")


def test_a_prompt_in_two_parts_is_the_same_prompt(folder: Path) -> None:
    model, inputs = prompts(folder)
    whole, split = (
        answer(model, inputs, peer.cache(model, ""), Generation(6, 6), peer=peer)
        for peer in (Exact(False), Exact(True))
    )
    for one, other in zip(whole.rows, split.rows, strict=True):
        assert one.ids == other.ids
        pairs = zip(one.log_probs, other.log_probs, strict=True)
        assert max(float((a.exp() - b.exp()).abs().max()) for a, b in pairs) < 1e-4


def test_the_first_answer_token_reads_what_is_stored(tiny_llava_folder: Path) -> None:
    model, inputs = prompts(tiny_llava_folder)
    exact = Exact(False)
    reference = answer(model, inputs, exact.cache(model, ""), Generation(3), peer=exact).rows
    first = {}
    for splits in (False, True):
        peer = Forgetful(splits)
        found = answer(model, inputs, peer.cache(model, ""), Generation(3), reference, peer).rows
        first[splits] = [row.divergences[0] for row in found]
    assert first[False] == pytest.approx([0, 0], abs=1e-6)
    assert min(first[True]) > 0.1


def test_a_prompt_of_one_token(tiny_text_folder: Path) -> None:
    model, inputs = prompts(tiny_text_folder, [""])
    assert inputs.input_ids.shape == (1, 1)
    peer = Exact(True)
    found = answer(model, inputs, peer.cache(model, ""), Generation(2, 2), peer=peer)
    assert len(found.rows[0].ids) == 2


def test_bytes_are_the_prompts(tiny_llava_folder: Path) -> None:
    model, inputs = prompts(tiny_llava_folder)
    peer = Exact(True)
    found = answer(model, inputs, peer.cache(model, ""), Generation(5, 5), peer=peer)
    numbers = inputs.input_ids.shape[1] * 3 * 2 * 2 * 16  # layers, keys and values, heads, channels
    for row in found.rows:
        assert row.usage is not None
        assert row.usage.nbytes == 4 * numbers
        assert row.usage.bits_per_element == 32
        assert row.usage.packed_tokens_read is None


class Notes(Silent):
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
def test_quanto_as_a_row(tiny_llava_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("optimum.quanto", reason="the extra [peers] is not installed")
    from kvbench.tasks.minimile import make

    make(tmp_path / "data", samples=2, folders=("ObjectExistence",))
    progress = Notes()
    request = EvalRequest(
        methods=choose_methods("fp16,hf_quanto_int2[group_size=16]"),
        models=(find_model(f"tiny={tiny_llava_folder}"),),
        tasks=("oe",),
        protocols=("quantized_prefill", "exact_prefill"),
        out=tmp_path / "run",
        data_root=tmp_path / "data",
        device="cpu",
    )
    evaluate(request, progress)
    rows = [row for row in read_rows(tmp_path / "run" / "samples.jsonl") if row.method != "fp16"]
    assert [note for note in progress.notes if "left out under quantized_prefill" in note]
    assert [row.protocol for row in rows] == ["exact_prefill"] * 2
    for row in rows:
        assert (row.status, row.storage, row.packed_tokens_read) == ("ok", "foreign", None)
        stored = 3 * 2 * 2 * ((row.prompt_tokens - 1) * (4 + 2 * 4) + 16 * 4)
        assert row.cache_bytes == stored
        assert row.bits_per_element == pytest.approx(
            8 * stored / (row.prompt_tokens * 3 * 2 * 2 * 16)
        )
        assert row.kl_first is not None and row.kl_first > 0
