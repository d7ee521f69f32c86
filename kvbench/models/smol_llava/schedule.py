"""Learning rate and task mixture as functions of time and of measured accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

WARMUP = 0.02
HOLD = 0.4
LAST = 0.02
FLOOR = 0.3


def rate(progress: float) -> float:
    """Share of the full learning rate: short warm-up, plateau, then a straight line down.

    Args:
        progress: elapsed share of the whole training, 0 to 1.
    """
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    if progress < HOLD:
        return 1.0
    return max(LAST, 1 - (1 - LAST) * (progress - HOLD) / (1 - HOLD))


def further_share(progress: float) -> float:
    """Share of samples with further turns: all at first, few from the middle on, none at last."""
    if progress < 0.25:
        return 1.0
    return max(0.0, min(0.3, 0.95 - progress) if progress > 0.6 else 1 - 2 * (progress - 0.25))


def task_weights(skill: Tensor) -> Tensor:
    """How often to draw each task, given its skill: 0 is guessing, 1 is perfect.

    Tasks that are being learned come most often, tasks near perfection seldom, none never.
    """
    left = (1 - skill.clamp(0, 1)) / 0.5
    learning = 1 + (skill > 0.03).to(skill.dtype) * 0.3
    return (left.clamp(max=1) * learning).clamp_min(FLOOR)


class Skills:
    """Running accuracy of every task between guessing and perfect.

    Attributes:
        value: float64 (tasks,), 0 before anything was seen.
    """

    def __init__(self, tasks: int, memory: float = 0.5) -> None:
        self.value = torch.zeros(tasks, dtype=torch.float64)
        self.memory = memory

    def update(self, hits: Tensor) -> None:
        """Takes in new counts (tasks, 3) of `objectives.letter_hits`, on the CPU."""
        right, seen, guessed = hits.double().unbind(1)
        new = (right - guessed) / (seen - guessed).clamp_min(1e-9)
        mixed = self.memory * self.value + (1 - self.memory) * new
        self.value = torch.where(seen > 0, mixed, self.value)
