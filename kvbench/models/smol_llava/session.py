"""One training run from start to end: what it needs, in the order a GPU machine wants it."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvbench.models.smol_llava import checkpoint, held_out, objectives, training, weights
from kvbench.models.smol_llava.architecture import build_tokenizer
from kvbench.models.smol_llava.attention import best
from kvbench.models.smol_llava.batches import Batch, Dials, Shape, Stream, start_workers
from kvbench.models.smol_llava.convert import converted_folder
from kvbench.models.smol_llava.examples import Sequencer
from kvbench.models.smol_llava.layers import Functions
from kvbench.models.smol_llava.network import SCALE, Factors, Language, Network
from kvbench.models.smol_llava.tower import Projector, Tower
from kvbench.tasks.easy_vqa import source as easy_vqa_source

log = logging.getLogger(__name__)


def sequencer(tokenizer: Any) -> Sequencer:
    """What turns drawings into tokens of a transformers tokenizer."""
    backend = tokenizer.backend_tokenizer
    return Sequencer(
        lambda text: list(backend.encode(text, add_special_tokens=False).ids),
        tokenizer.image_token_id,
        tokenizer.eos_token_id,
    )


def language_model(folder: Path, tiny: bool) -> Any:
    """SmolLM2 as a `LlamaForCausalLM`, float32; with `tiny` two narrow random layers instead."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

    if not tiny:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 2, 192, 256
    config.num_attention_heads, config.num_key_value_heads = 3, 1
    model: Any = LlamaForCausalLM(config)
    return model.float()


@dataclass
class Session:
    """A run's parts; made by `start`, then `warm_up`, `train_tower`, `train_jointly`, `finish`."""

    options: argparse.Namespace
    deadline: float
    device: torch.device
    source: training.Source
    dials: Dials
    trainee: training.Trainee
    words: torch.Tensor
    progress: checkpoint.Progress
    restored: dict[str, torch.Tensor]

    @classmethod
    def start(cls, options: argparse.Namespace, deadline: float) -> Session:
        """Starts workers, then loads the models: forks must come before anything on the GPU.

        Raises:
            UserError: SmolLM2, easy-VQA or the state to resume are missing.
        """
        options.state = options.state or options.out / "state"
        restored, progress = (
            checkpoint.read(options.resume) if options.resume else ({}, checkpoint.Progress())
        )
        base = converted_folder(options.gguf, options.base)
        tokenizer = build_tokenizer(base)
        tokens = sequencer(tokenizer)
        for split in easy_vqa_source.SPLITS:
            easy_vqa_source.load(split)  # once, before workers are forked
        cuda, shape, dials = torch.cuda.is_available(), Shape.of(options.tokens), Dials.fresh()
        seed = f"{options.seed}/{progress.steps}"
        stream = Stream(tokens, shape, dials, tokenizer.pad_token_id, options.held_out, seed)
        batches = start_workers(stream, options.workers, pinned=cuda)
        log.info("workers started: %d, %s", options.workers, shape)
        device = torch.device("cuda" if cuda else "cpu")
        torch.manual_seed(int(options.seed))
        torch.set_float32_matmul_precision("high")
        model = language_model(base, options.smoke)
        dtype = torch.bfloat16 if cuda else torch.float32
        network = Network(Language.of(model, dtype).to(device), options.rank)
        trainee = training.Trainee(network).to(device)
        if restored:
            checkpoint.restore_weights(trainee, restored)
        words = objectives.word_vectors(network.language.embedding, tokens.encode)
        source = training.Source(batches, device)
        session = cls(options, deadline, device, source, dials, trainee, words, progress, restored)
        log.info("models loaded on %s, torch %s, %s", device, torch.__version__, progress)
        return session

    def left(self) -> float:
        """Seconds until training must stop."""
        reserve: float = self.options.reserve_seconds
        return self.deadline - time.monotonic() - reserve

    def warm_up(self) -> None:
        """Chooses attention and compiles all functions on one batch; changes no weight."""
        network = self.trainee.network
        network.attention = best(self.device)
        if not self.options.plain:
            network.functions = Functions.compiled()
        batch = self.source.next()
        for _ in range(2):
            loss = training.resilient(network, lambda: self._trial(batch))
        log.info(
            "first batches: %d samples, loss %.3f, attention %s, compiled %s, peak memory %.1f GiB",
            len(batch.tasks), loss.item(), network.attention.__name__,
            network.functions.before is not Functions().before,
            torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0,
        )  # fmt: skip

    def _trial(self, batch: Batch) -> torch.Tensor:
        self.trainee.zero_grad(set_to_none=True)
        loss, _ = training.joint_step(self.trainee, batch)
        self.trainee.zero_grad(set_to_none=True)
        return loss

    def rates(self) -> training.Rates:
        """Learning rates from the command line."""
        o = self.options
        return training.Rates(o.rate_alone, o.rate_vision, o.rate_factors)

    def train_tower(self) -> None:
        """The tower alone."""
        seconds = min(self.options.alone_seconds, self.left())
        every = min(self.options.log_seconds, seconds / 4)
        training.train_alone(self.trainee, self.source, self.words, seconds, self.rates(), every)

    def train_jointly(self) -> None:
        """Everything, until `left` says stop."""
        optimizer = self.trainee.optimizer(self.rates())
        if self.restored:
            known = checkpoint.restore_moments(self.trainee, optimizer, self.restored)
            log.info("resumed at %s, %s moments", self.progress, "known" if known else "fresh")
        seconds = self.left()
        minutes = self.options.horizon_minutes
        horizon = 60 * minutes if minutes else self.progress.seconds + seconds

        def save() -> None:
            checkpoint.save_full(self.options.state, self.trainee, optimizer, self.progress)
            checkpoint.save_parts(self.options.out, self.trainee, self.progress)

        joint = training.Joint(
            self.trainee, self.source, self.dials, optimizer, self.progress, horizon,
            self.options.accumulate, self.options.log_seconds, save,
        )  # fmt: skip
        joint.run(seconds)
        save()
        log.info("state saved")

    def finish(self) -> dict[str, float]:
        """Scores of the rounded weights on the held-out samples."""
        held_out.rounded(self.trainee.network)
        scores = held_out.evaluate(self.trainee.network, self.source.held_out, self.device)
        log.info(
            "held out, %d samples:\n%s",
            sum(len(batch.tasks) for batch in self.source.held_out), held_out.table(scores),
        )  # fmt: skip
        return scores


def export_weights(folder: Path, path: Path) -> Path:
    """Writes the shipped file from a run's parts or full state.

    Raises:
        UserError: the folder holds neither, or they don't fit.
    """
    tensors, progress = checkpoint.read(folder)
    found = checkpoint.below(tensors, "weights.network.")
    rank = found["factors.a.q"].shape[1]
    matrices = {
        name: torch.empty(
            found[f"factors.b.{name}"].shape[:2] + found[f"factors.a.{name}"].shape[2:],
            device="meta",
        )
        for name in weights.MATRICES
    }
    tower, factors = Tower(), Factors(matrices, rank)
    projector = Projector(found["projector.linear_2.weight"].shape[0])
    for prefix, part in {"tower.": tower, "projector.": projector, "factors.": factors}.items():
        checkpoint.restore_weights(part, {
            f"weights.{name}": x for name, x in checkpoint.below(found, prefix).items()
        })  # fmt: skip
    notes = {"steps": str(progress.steps), "samples": str(progress.samples)}
    weights.save(weights.exported(tower, projector, factors), path, SCALE, **notes)
    return path
