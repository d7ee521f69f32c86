"""SKVQ's channel groups against k-means written out in numpy."""

from __future__ import annotations

import numpy as np
import torch

from methods.skvq import _clusters


def _spread(points: np.ndarray, labels: np.ndarray) -> float:
    groups = (points[labels == label] for label in np.unique(labels))
    return float(sum(((group - group.mean(0)) ** 2).sum() for group in groups))


def _lloyd(points: np.ndarray, count: int, generator: np.random.Generator) -> float:
    centers = points[generator.choice(len(points), count, replace=False)]
    for _ in range(60):
        labels = ((points[:, None] - centers) ** 2).sum(-1).argmin(1)
        filled = [points[labels == k] for k in range(count)]
        centers = np.array([g.mean(0) if len(g) else centers[k] for k, g in enumerate(filled)])
    return _spread(points, labels)


def test_groups_are_the_tightest_of_many_starts() -> None:
    ratios = []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        points = np.sort(generator.standard_t(3, (96, 2)), axis=1)
        order, sizes = _clusters(*torch.from_numpy(points.T.copy()), 6, 0)
        labels = np.empty(96, dtype=int)
        labels[order.numpy()] = np.repeat(np.arange(len(sizes)), sizes)
        best = min(_lloyd(points, 6, generator) for _ in range(40))
        ratios.append(_spread(points, labels) / best)
    assert np.mean(ratios) < 1.03
