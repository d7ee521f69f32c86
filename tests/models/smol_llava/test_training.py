"""The training script of the bundled model: data, layers, schedule, checkpoints, a whole run."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.errors import UserError
from kvbench.models.smol_llava import checkpoint, objectives, schedule, train, weights
from kvbench.models.smol_llava.attention import padded
from kvbench.models.smol_llava.batches import (
    ATTRIBUTES,
    IGNORED,
    Batch,
    Dials,
    Shape,
    Stream,
    groups,
    pack,
)
from kvbench.models.smol_llava.examples import FOLDERS, Example, Sequencer, draw
from kvbench.models.smol_llava.layers import Functions, rotate
from kvbench.models.smol_llava.network import Language, Network
from kvbench.models.smol_llava.training import resilient
from kvbench.tasks.minimile import Drawing

IMAGE, END = 4, 2
has_easy_vqa = pytest.mark.skipif(
    importlib.util.find_spec("easy_vqa") is None, reason="the wheel easy-vqa is missing"
)


@pytest.fixture
def sequencer() -> Sequencer:
    """Characters as tokens, 10 + code point; the turn's end is token 2."""

    def encode(text: str) -> list[int]:
        pieces = text.split("<|im_end|>")
        ids = [[10 + ord(letter) for letter in piece] for piece in pieces]
        return [token for piece in ids for token in [END, *piece]][1:]

    return Sequencer(encode, IMAGE, END)


def spoken(tokens: list[int]) -> str:
    return "".join("$" if token == END else chr(token - 10) for token in tokens)


def drawing(images: int = 2, answer: str = "red cross") -> Drawing:
    return Drawing(
        folder="WebQA",
        context="".join(f"Page {k}: {{image#{k}}}\n" for k in range(1, images + 1)) + "Question: x",
        choices=("blue square", "red cross"),
        answer=answer,
        images=[np.full((64, 64, 3), k, np.uint8) for k in range(images)],
        captions=tuple(f"thing {k}" for k in range(images)),
        facts=tuple({"color": "red"} for _ in range(images)),
    )


def example(length: int, images: int = 1) -> Example:
    ids = list(range(100, 100 + length))
    return Example(ids, [2] * images, [length - 2, length - 1], [3.0, 1.0], 0, 4, 5,
                   drawing(images))  # fmt: skip


def test_answer_is_what_the_loss_counts(sequencer: Sequencer) -> None:
    made = sequencer.example(drawing(), 7, Random(0), further=False)
    assert spoken([made.ids[k] for k in made.targets]) == "B. red cross$"
    assert made.weights == [3.0] + [1.0] * 12
    assert (made.letter, made.options, made.task) == (0, 2, 7)
    assert made.targets[-1] == len(made.ids) - 1
    assert [made.ids[k : k + 64] for k in made.image_starts] == [[IMAGE] * 64] * 2


def test_further_turns_tell_what_single_images_show(sequencer: Sequencer) -> None:
    answers = set()
    for seed in range(20):
        made = sequencer.example(drawing(), 0, Random(seed), further=True)
        said = spoken([made.ids[k] for k in made.targets])
        first, *others, last = said.split("$")
        assert (first, last) == ("B. red cross", "")
        answers |= set(others)
        assert set(made.weights[13:]) <= {0.3}
    listed = {"Page 1: thing 0\nPage 2: thing 1"}
    assert answers == {"thing 0", "thing 1", "Page 1", "Page 2", "red"} | listed


def test_same_captions_are_not_asked_to_be_told_apart(sequencer: Sequencer) -> None:
    same = replace(drawing(), captions=("thing", "thing"))
    for seed in range(20):
        made = sequencer.example(same, 0, Random(seed), further=True)
        text = spoken([10 + ord("#") if token == IMAGE else token for token in made.ids])
        assert "Which one" not in text


def test_pack_lays_sequences_end_to_end() -> None:
    batch = pack([example(70), example(90)], Shape(1000, 4), pad=0)
    assert batch.bounds.tolist() == [0, 70, 160, 672, 1000]
    assert batch.longest == 512
    assert batch.ids[[0, 69, 70, 159, 160]].tolist() == [100, 169, 100, 189, 0]
    assert batch.positions[[69, 70, 159, 160, 671, 672]].tolist() == [69, 0, 89, 0, 511, 0]
    # The token at 68 is predicted from 67, and so on; the second sequence begins at 70.
    assert batch.sources.tolist() == [67, 68, 157, 158]
    assert batch.labels.tolist() == [168, 169, 188, 189]
    assert batch.letters.tolist() == [0, 2]
    assert batch.tasks.tolist() == [5, 5]
    assert batch.chances.tolist() == [0.25, 0.25]
    assert batch.image_tokens[[0, 63, 64, 127]].tolist() == [2, 65, 72, 135]
    red = [0 if name == "color" else IGNORED for name in ATTRIBUTES]
    assert batch.facts.tolist() == [red, red, [IGNORED] * len(red), [IGNORED] * len(red)]


def test_groups_fill_tokens_or_images_and_lose_nothing() -> None:
    shape = Shape(200, 3)
    lengths = [(90, 1), (90, 1), (30, 1), (10, 2), (199, 1), (500, 1), (10, 4), (5, 1)]
    found = [
        [(len(e.ids), len(e.drawing.images)) for e in group]
        for group in groups((example(*pair) for pair in lengths), shape)
    ]
    assert found == [[(90, 1), (90, 1)], [(30, 1), (10, 2)], [(199, 1)], [(5, 1)]]


@has_easy_vqa
def test_workers_share_the_held_out_samples(sequencer: Sequencer) -> None:
    stream = Stream(sequencer, Shape(4000, 40), Dials.fresh(), 0, held_out=3, seed="0")
    whole = [e.ids for e in stream.held_out_examples(0, 1)]
    shared = [e.ids for worker in (0, 1) for e in stream.held_out_examples(worker, 2)]
    assert len(whole) == 3 * len(FOLDERS)
    assert sorted(whole) == sorted(shared)


@has_easy_vqa
def test_dials_choose_the_tasks(sequencer: Sequencer) -> None:
    dials = Dials.fresh()
    dials.tasks.zero_()
    dials.tasks[3] = 1.0
    examples = Stream(sequencer, Shape(4000, 40), dials, 0, 0, "0").training_examples(worker=0)
    assert [next(examples).task for _ in range(5)] == [3] * 5


def test_every_task_is_drawn_the_same_from_the_same_seed() -> None:
    for folder in FOLDERS[:12]:
        first, second = (draw(folder, Random(9), "train") for _ in range(2))
        assert first.context == second.context
        np.testing.assert_array_equal(first.images[-1], second.images[-1])


def test_padded_attention_equals_softmax_within_each_sequence() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(7, heads, 64)) for heads in (6, 2, 2))
    bounds = [0, 3, 4, 7]
    expected = np.zeros((7, 6, 64))
    for start, end in pairwise(bounds):
        for row in range(start, end):
            for head in range(6):
                scores = k[start : row + 1, head // 3] @ q[row, head] / 8
                share = np.exp(scores - scores.max())
                expected[row, head] = share @ v[start : row + 1, head // 3] / share.sum()
    found = padded(
        *(torch.from_numpy(x) for x in (q, k, v)), torch.tensor(bounds, dtype=torch.int32), 3
    )
    np.testing.assert_allclose(found.numpy(), expected.reshape(7, -1), atol=1e-12)


def test_rotation_turns_pairs_half_a_head_apart() -> None:
    x = torch.zeros(1, 1, 64)
    x[0, 0, 0], x[0, 0, 32] = 1.0, 2.0
    angle = 0.3
    tables = (torch.full((1, 64), float(f(angle))) for f in (np.cos, np.sin))
    turned = rotate(x, *tables)[0, 0]
    assert turned[0].item() == pytest.approx(np.cos(angle) - 2 * np.sin(angle))
    assert turned[32].item() == pytest.approx(2 * np.cos(angle) + np.sin(angle))


def test_answer_loss_weighs_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, np.log(3.0)]])
    batch = pack([example(70)], Shape(200, 1), pad=0)._replace(
        labels=torch.tensor([0, 1]), weights=torch.tensor([3.0, 1.0])
    )
    expected = (3 * np.log(2) + np.log(4 / 3)) / 4
    assert objectives.answer_loss(logits, batch).item() == pytest.approx(expected, rel=1e-6)


def test_letter_hits_count_by_task() -> None:
    batch = pack([example(70), example(70)], Shape(400, 2), pad=0)
    batch = batch._replace(
        labels=torch.tensor([1, 0, 1, 0]), tasks=torch.tensor([0, 12]),
        chances=torch.tensor([0.5, 0.25]),
    )  # fmt: skip
    logits = torch.tensor([[0.0, 1.0, 0.5]] * 2 + [[0.0, 1.0, 1.5]] * 2)
    hits = objectives.letter_hits(logits, batch)
    assert hits[0].tolist() == [1.0, 1.0, 0.5]
    assert hits[12].tolist() == [0.0, 1.0, 0.25]
    assert hits[1:12].abs().sum() == 0


def test_fact_loss_skips_what_nobody_told() -> None:
    logits = torch.zeros(2, len(ATTRIBUTES), objectives.VALUES)
    logits[:, 0, 3] = np.log(2.0)
    facts = torch.full((2, len(ATTRIBUTES)), IGNORED)
    facts[0, 0], facts[1, 0] = 3, 1
    total = objectives.VALUES + 1.0
    expected = -(np.log(2 / total) + np.log(1 / total)) / 2
    assert objectives.fact_loss(logits, facts).item() == pytest.approx(expected, rel=1e-5)
    assert objectives.fact_hits(logits, facts)[0].tolist() == [1.0, 2.0]


def test_rate_warms_up_holds_and_runs_down() -> None:
    assert schedule.rate(0.01) == pytest.approx(0.5)
    assert schedule.rate(0.02) == schedule.rate(0.39) == 1.0
    assert schedule.rate(0.7) == pytest.approx(0.51)
    assert schedule.rate(1.0) == pytest.approx(0.02)


def test_further_turns_end_with_training() -> None:
    shares = [schedule.further_share(x) for x in (0.0, 0.25, 0.45, 0.65, 0.95, 1.0)]
    assert shares == pytest.approx([1.0, 1.0, 0.6, 0.3, 0.0, 0.0])


def test_mastered_tasks_come_less_often_but_never_cease() -> None:
    found = schedule.task_weights(torch.tensor([-0.1, 0.2, 0.8, 1.0]).double()).tolist()
    assert found == pytest.approx([1.0, 1.3, 0.52, 0.3])


def test_skill_is_accuracy_between_chance_and_perfection() -> None:
    skills = schedule.Skills(2, memory=0.5)
    skills.update(torch.tensor([[7.0, 8.0, 4.0], [0.0, 0.0, 0.0]]))
    assert skills.value.tolist() == [0.375, 0.0]
    skills.update(torch.tensor([[4.0, 8.0, 4.0], [1.0, 1.0, 0.25]]))
    assert skills.value.tolist() == [0.1875, 0.5]


def tiny_modules() -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(0)
    modules = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.1)
    modules(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return modules, optimizer


def test_full_state_continues_exactly(tmp_path: Path) -> None:
    modules, optimizer = tiny_modules()
    progress = checkpoint.Progress(1.5, 2, 3)
    checkpoint.save_full(tmp_path, modules, optimizer, progress)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    resumed = torch.optim.AdamW(other.parameters(), lr=0.1)
    tensors, found = checkpoint.read(tmp_path)
    checkpoint.restore_weights(other, tensors)
    assert checkpoint.restore_moments(other, resumed, tensors)
    assert found == progress
    for model, stepper in ((modules, optimizer), (other, resumed)):
        stepper.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        stepper.step()
    for one, two in zip(modules.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_parts_stay_small_and_hold_rounded_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PART_BYTES", 30)
    modules, _ = tiny_modules()
    paths = checkpoint.save_parts(tmp_path, modules, checkpoint.Progress(4.0, 5, 6))
    assert len(paths) == 2  # 24 + 8 bytes exceed 30, then 8 + 16 + 4 fit
    tensors, progress = checkpoint.read(tmp_path)
    assert progress.steps == 5
    for name, weight in modules.state_dict().items():
        assert torch.equal(tensors[f"weights.{name}"], weight.bfloat16())


def test_folder_without_state_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        checkpoint.read(tmp_path)


def test_failing_compiler_is_replaced() -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no compiler")

    class Part:
        functions = Functions(before=broken)

    part: Any = Part()
    assert resilient(part, lambda: broken() if part.functions.before is broken else 7) == 7
    with pytest.raises(ValueError, match="a bug"):
        resilient(part, lambda: (_ for _ in ()).throw(ValueError("a bug")))


def test_full_memory_is_answered_by_recomputing() -> None:
    class Part:
        functions = Functions()

    part: Any = Part()

    def step() -> Any:
        if not part.functions.recompute:
            raise torch.OutOfMemoryError
        return 8

    assert resilient(part, step) == 8


def tiny_network() -> Network:
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=1, num_key_value_heads=1, head_dim=64, tie_word_embeddings=True,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    torch.manual_seed(0)
    network = Network(Language.of(LlamaForCausalLM(config), torch.float32), rank=2)
    for factor in network.factors.b.values():
        factor.data.normal_()
    return network


def test_recomputing_changes_no_gradient() -> None:
    batch: Batch = pack([example(70), example(90)], Shape(300, 2), pad=0)
    batch = batch._replace(image_tokens=torch.cat([torch.arange(2, 66), torch.arange(72, 136)]))
    gradients = []
    for recompute in (False, True):
        network = tiny_network()
        network.functions = Functions(recompute=recompute)
        network(batch)[0].square().sum().backward()
        gradients.append([x.grad for x in network.parameters() if x.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_later_sequences_do_not_see_earlier_ones() -> None:
    network = tiny_network()
    pair = [example(70), example(90)]
    with torch.no_grad():
        together, _ = network(pack(pair, Shape(300, 2), pad=0))
        alone, _ = network(pack(pair[1:], Shape(150, 2), pad=0))
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@has_easy_vqa
def test_whole_run_resumes_and_exports(base: Path, tmp_path: Path) -> None:
    common = ["--smoke", "--workers", "0", "--base", str(base)]
    assert train.main([*common, "--minutes", "0.1", "--out", str(tmp_path / "one")]) == 0
    _, first = checkpoint.read(tmp_path / "one" / "state")
    again = ["--minutes", "0.01", "--out", str(tmp_path / "two"), "--resume", str(tmp_path / "one")]
    assert train.main([*common, *again]) == 0
    _, second = checkpoint.read(tmp_path / "two" / "state")
    assert second.steps > first.steps >= 1
    assert second.seconds > first.seconds
    scores = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert list(scores) == list(FOLDERS)
    target = tmp_path / "three"
    assert train.main(["--export", str(tmp_path / "two"), "--out", str(target)]) == 0
    state, notes = weights.read(target / "weights.safetensors")
    assert notes["steps"] == str(second.steps)
    assert state["factors.a.q"].shape == (2, 4, 192)


def test_resuming_from_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--smoke", "--out", str(tmp_path / "out"), "--resume", str(tmp_path / "nothing")]
    assert train.main(words) == 2
    assert "holds neither" in capsys.readouterr().err
