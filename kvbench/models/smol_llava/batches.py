"""Micro-batches of packed sequences, made by worker processes.

Sequences of all tasks and lengths are laid end to end until a fixed number of tokens (or images)
is full, so every micro-batch has one shape for the compiler and a mixture of all tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kvbench.models.smol_llava.architecture import IMAGE_SIZE, TOKENS_PER_IMAGE
from kvbench.models.smol_llava.examples import FOLDERS, Example, Sequencer, draw
from kvbench.tasks.minimile import FACT_VOCABULARY

ATTRIBUTES: tuple[str, ...] = tuple(FACT_VOCABULARY)
IGNORED = -100
PADDING = 512
"""Tokens of padding behind the last sample are cut into sequences of at most this length."""

_VALUE = {
    name: {value: index for index, value in enumerate(values)}
    for name, values in FACT_VOCABULARY.items()
}


class Batch(NamedTuple):
    """One micro-batch of N tokens, V images, S sequences and K tokens to predict.

    Attributes:
        pixels: uint8 (V, 64, 64, 3); images beyond the last are black.
        facts: int64 (V, attributes), an index into the vocabulary or `IGNORED`.
        ids: int64 (N,).
        positions: int64 (N,), counted from each sequence's start.
        bounds: int32 (S + 1,), where sequences begin and the last one ends; padding comes last.
        image_tokens: int64 (64 a real image,), where image features go.
        sources: int64 (K,), the positions whose output predicts a token.
        labels: int64 (K,).
        weights: float32 (K,).
        letters: int64 (samples,), which of K are option letters.
        tasks: int64 (samples,), index into `FOLDERS`.
        chances: float32 (samples,), accuracy of guessing.
        longest: tokens of the longest sequence.
        held_out: whether this is for evaluation only.
    """

    pixels: torch.Tensor
    facts: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    image_tokens: torch.Tensor
    sources: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    letters: torch.Tensor
    tasks: torch.Tensor
    chances: torch.Tensor
    longest: int
    held_out: bool

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`; the bounds go along."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if torch.is_tensor(value)
        }
        return self._replace(**moved)


@dataclass(frozen=True)
class Shape:
    """How large a micro-batch is: tokens and images it holds."""

    tokens: int
    images: int

    @classmethod
    def of(cls, tokens: int) -> Shape:
        """Room for as many images as the tasks' mixture needs: one in 78 tokens."""
        return cls(tokens, max(16, tokens // 78 // 8 * 8))


def fact_labels(facts: dict[str, str]) -> list[int]:
    """Vocabulary indices of an image's facts, in the order of `ATTRIBUTES`."""
    return [_VALUE[name][facts[name]] if name in facts else IGNORED for name in ATTRIBUTES]


def groups(examples: Iterable[Example], shape: Shape) -> Iterator[list[Example]]:
    """Consecutive examples that fit into one micro-batch together; the rest at the end.

    Examples that are alone too large are left out.
    """
    group: list[Example] = []
    tokens = images = 0
    for example in examples:
        more = len(example.ids), len(example.drawing.images)
        if more[0] >= shape.tokens or more[1] > shape.images:
            continue
        # At least one token of padding is left: it is a sequence of its own.
        if tokens + more[0] >= shape.tokens or images + more[1] > shape.images:
            yield group
            group, tokens, images = [], 0, 0
        group.append(example)
        tokens, images = tokens + more[0], images + more[1]
    if group:
        yield group


def pack(examples: list[Example], shape: Shape, pad: int, held_out: bool = False) -> Batch:
    """Lays examples end to end; `groups` says which fit.

    Args:
        examples: fewer tokens than `shape.tokens` in all.
        shape: of the batch.
        pad: the id of tokens behind the last example.
        held_out: marks a batch that is not to be trained on.
    """
    ids = np.full(shape.tokens, pad, np.int64)
    positions = np.zeros(shape.tokens, np.int64)
    pixels = np.zeros((shape.images, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    facts = np.full((shape.images, len(ATTRIBUTES)), IGNORED, np.int64)
    bounds, image = [0], 0
    starts: list[int] = []
    sources: list[int] = []
    weights: list[float] = []
    letters: list[int] = []
    for example in examples:
        start, end = bounds[-1], bounds[-1] + len(example.ids)
        ids[start:end] = example.ids
        positions[start:end] = np.arange(end - start)
        starts += [start + k for k in example.image_starts]
        letters.append(len(sources) + example.letter)
        sources += [start + k - 1 for k in example.targets]
        weights += example.weights
        for picture, told in zip(example.drawing.images, example.drawing.facts, strict=True):
            pixels[image], facts[image] = picture, fact_labels(told)
            image += 1
        bounds.append(end)
    while bounds[-1] < shape.tokens:
        end = min(shape.tokens, bounds[-1] + PADDING)
        positions[bounds[-1] : end] = np.arange(end - bounds[-1])
        bounds.append(end)
    where = np.array(sources)
    return Batch(
        pixels=torch.from_numpy(pixels),
        facts=torch.from_numpy(facts),
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        bounds=torch.tensor(bounds, dtype=torch.int32),
        image_tokens=torch.from_numpy(
            (np.array(starts)[:, None] + np.arange(TOKENS_PER_IMAGE)).reshape(-1)
        ),
        sources=torch.from_numpy(where),
        labels=torch.from_numpy(ids[where + 1]),
        weights=torch.tensor(weights, dtype=torch.float32),
        letters=torch.tensor(letters),
        tasks=torch.tensor([example.task for example in examples]),
        chances=torch.tensor([1 / example.options for example in examples]),
        longest=int(np.diff(bounds).max()),
        held_out=held_out,
    )


@dataclass(frozen=True)
class Dials:
    """What the trainer turns while workers run; both tensors lie in shared memory.

    Attributes:
        tasks: float64 (tasks,), how often each task is drawn, any positive scale.
        further: float64 (1,), the share of samples with further turns.
    """

    tasks: torch.Tensor
    further: torch.Tensor

    @classmethod
    def fresh(cls) -> Dials:
        """All tasks equally often, further turns always."""
        dials = cls(torch.ones(len(FOLDERS)).double(), torch.ones(1).double())
        for tensor in (dials.tasks, dials.further):
            tensor.share_memory_()
        return dials


class Stream(IterableDataset[Batch]):
    """An endless stream of micro-batches; each worker begins with its part of the held-out ones."""

    def __init__(
        self, sequencer: Sequencer, shape: Shape, dials: Dials, pad: int, held_out: int, seed: str
    ) -> None:
        self.sequencer, self.shape, self.dials = sequencer, shape, dials
        self.pad, self.held_out, self.seed = pad, held_out, seed

    def held_out_examples(self, worker: int, workers: int) -> Iterator[Example]:
        """This worker's part of the held-out samples: `held_out` a task over all workers."""
        for task, folder in enumerate(FOLDERS):
            for number in range(worker, self.held_out, workers):
                rng = Random(f"test/{folder}/held-out/{number}")
                yield self.sequencer.example(draw(folder, rng, "test"), task, rng, further=False)

    def training_examples(self, worker: int) -> Iterator[Example]:
        """Endless training samples, tasks drawn as the dials say at the time."""
        rng = Random(f"train/{self.seed}/{worker}")
        while True:
            weights = self.dials.tasks.tolist()
            further = self.dials.further.item()
            for task in rng.choices(range(len(FOLDERS)), weights, k=64):
                drawing = draw(FOLDERS[task], rng, "train")
                yield self.sequencer.example(drawing, task, rng, rng.random() < further)

    def __iter__(self) -> Iterator[Batch]:
        """Held-out batches first, then training batches for ever."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        torch.set_num_threads(1)
        for group in groups(self.held_out_examples(worker, workers), self.shape):
            yield pack(group, self.shape, self.pad, held_out=True)
        for group in groups(self.training_examples(worker), self.shape):
            yield pack(group, self.shape, self.pad)


def start_workers(stream: Stream, workers: int, pinned: bool) -> Iterator[Batch]:
    """Forks worker processes; call it before anything touches the GPU.

    Args:
        stream: what they make.
        workers: how many; 0 makes batches in this process.
        pinned: whether batches come in page-locked memory.
    """
    queued: dict[str, Any] = {}
    if workers:
        free = os.statvfs("/dev/shm")  # asked for its size, nothing is written  # nosec B108
        room = free.f_bavail * free.f_frsize / 2
        size = stream.shape.images * IMAGE_SIZE**2 * 3 + 40 * stream.shape.tokens
        workers = int(max(1, min(workers, room // size)))
        queued = {
            "prefetch_factor": int(max(1, min(6, room // (workers * size)))),
            "multiprocessing_context": "fork",
        }
    loader = DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=pinned, **queued)
    return iter(loader)
