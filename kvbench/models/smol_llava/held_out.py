"""Accuracy on held-out samples, as greedy decoding's first token would have it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvbench.models.smol_llava.batches import Batch
from kvbench.models.smol_llava.examples import FOLDERS
from kvbench.models.smol_llava.layers import Functions
from kvbench.models.smol_llava.network import Network
from kvbench.models.smol_llava.objectives import letter_hits


@torch.no_grad()
def evaluate(network: Network, batches: Iterable[Batch], device: torch.device) -> dict[str, float]:
    """Share of right option letters by task, of those that have samples.

    Layers run uncompiled, since without gradients the compiler would start anew.
    """
    used, network.functions = network.functions, Functions()
    hits = torch.zeros(len(FOLDERS), 3)
    for batch in batches:
        moved = batch.to(device)
        hits += letter_hits(network(moved)[0], moved).cpu()
    network.functions = used
    return {
        folder: right / seen
        for folder, (right, seen, _) in zip(FOLDERS, hits.tolist(), strict=True)
        if seen
    }


def table(scores: dict[str, float]) -> str:
    """Scores in percent, a task a line, with the mean over MileBench's twelve below."""
    twelve = [score for folder, score in scores.items() if folder != FOLDERS[-1]]
    lines = [f"{folder:22s} {100 * score:6.1f}" for folder, score in scores.items()]
    mean = 100 * sum(twelve) / max(1, len(twelve))
    return "\n".join([*lines, f"{'mean of the twelve':22s} {mean:6.1f}"])


def rounded(network: Network) -> None:
    """Rounds all trained weights to bfloat16 in place: what will be shipped."""
    for parameter in network.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
