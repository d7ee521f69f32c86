"""What is minimised: option letters and words, and the facts that describe each image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbench.models.smol_llava.batches import ATTRIBUTES, IGNORED, Batch
from kvbench.models.smol_llava.examples import FOLDERS
from kvbench.models.smol_llava.tower import WIDTH
from kvbench.tasks.minimile import FACT_VOCABULARY

VALUES = max(map(len, FACT_VOCABULARY.values()))
SHARPNESS = 20.0  # of the cosine between projected tokens and word embeddings
ALIGNMENT = 0.3


class FactHeads(nn.Module):
    """Reads every attribute off the tower's tokens with an attention pooling of its own.

    Used in training only. All attributes are computed at once, padded to the longest vocabulary.
    """

    valid: Tensor

    def __init__(self) -> None:
        super().__init__()
        count = len(ATTRIBUTES)
        self.norm = nn.LayerNorm(WIDTH)
        self.pool = nn.Linear(WIDTH, count)
        self.weight = nn.Parameter(torch.randn(count, WIDTH, VALUES) * WIDTH**-0.5)
        self.bias = nn.Parameter(torch.zeros(count, VALUES))
        sizes = torch.tensor([len(FACT_VOCABULARY[name]) for name in ATTRIBUTES])
        self.register_buffer("valid", torch.arange(VALUES) < sizes[:, None], persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pooling weights (V, attributes, 64) and logits (V, attributes, values), float32."""
        tokens = self.norm(tokens)
        pooling = self.pool(tokens).softmax(1).transpose(1, 2)
        logits = torch.einsum("vad,adc->vac", pooling @ tokens, self.weight) + self.bias
        return pooling, logits.masked_fill(~self.valid, -1e4)


def fact_loss(logits: Tensor, facts: Tensor) -> Tensor:
    """Cross entropy (V, attributes, values) against indices, averaged per attribute, summed."""
    each = F.cross_entropy(
        logits.flatten(0, 1), facts.flatten(), ignore_index=IGNORED, reduction="none"
    )
    told = (facts != IGNORED).sum(0).clamp_min(1)
    return (each.view_as(facts).sum(0) / told).sum()


def fact_hits(logits: Tensor, facts: Tensor) -> Tensor:
    """Right and told facts by attribute, (attributes, 2)."""
    told = facts != IGNORED
    return torch.stack([((logits.argmax(-1) == facts) & told).sum(0), told.sum(0)], 1).float()


def word_vectors(embedding: Tensor, encode: Callable[[str], tuple[int, ...]]) -> Tensor:
    """Unit vectors (attributes, values, D) of the words that name each value.

    The mean embedding is taken off first, since all embeddings share a large common part.
    """
    table = embedding.float()
    mean = table.mean(0)
    vectors = torch.zeros(len(ATTRIBUTES), VALUES, table.shape[1], device=table.device)
    for row, name in enumerate(ATTRIBUTES):
        for column, value in enumerate(FACT_VOCABULARY[name]):
            ids = list(encode(value if value.isdigit() else f" {value}"))
            vectors[row, column] = F.normalize(table[ids].mean(0) - mean, dim=0)
    return vectors


def alignment_loss(
    pooling: Tensor, projected: Tensor, words: Tensor, valid: Tensor, facts: Tensor
) -> Tensor:
    """Pulls the projected tokens that a head looks at to the word that is right.

    Args:
        pooling: (V, attributes, 64).
        projected: (V, 64, D).
        words: (attributes, values, D).
        valid: (attributes, values).
        facts: (V, attributes).
    """
    seen = F.normalize(pooling @ projected.float(), dim=-1)
    logits = SHARPNESS * torch.einsum("vad,acd->vac", seen, words)
    return ALIGNMENT * fact_loss(logits.masked_fill(~valid, -1e4), facts)


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted cross entropy of the tokens to be predicted."""
    each = F.cross_entropy(logits, batch.labels, reduction="none")
    return (each * batch.weights).sum() / batch.weights.sum()


def letter_hits(logits: Tensor, batch: Batch) -> Tensor:
    """By task: right letters, samples, and the sum of guessing's accuracies, (tasks, 3).

    A letter is right if it is the likeliest of the whole vocabulary, as in greedy decoding.
    """
    right = logits[batch.letters].argmax(-1) == batch.labels[batch.letters]
    columns = (right.float(), torch.ones_like(batch.chances), batch.chances)
    zeros = torch.zeros(len(FOLDERS), device=logits.device)
    return torch.stack([zeros.index_add(0, batch.tasks, column) for column in columns], 1)
