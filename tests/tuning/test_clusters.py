"""Pareto sets and clusters of layers, against brute force and planted groups."""

from __future__ import annotations

import numpy as np
import pytest

from kvbench.tuning.clusters import cluster, pareto, worth_trying
from kvbench.tuning.sensitivity import Sensitivity

CHOICES = ("large", "middle", "odd", "small")


def made(error: list[list[float]]) -> Sensitivity:
    layers = len(error)
    bits = np.tile([8.0, 4.0, 4.0, 2.0], (layers, 1))
    return Sensitivity(CHOICES, np.array(error), bits, bits * 10)


@pytest.mark.parametrize("seed", range(20))
def test_pareto_keeps_what_nothing_beats(seed: int) -> None:
    points = np.random.default_rng(seed).integers(0, 6, (12, 2)).astype(float)
    kept = pareto(points[:, 0].tolist(), points[:, 1].tolist())
    beaten = [
        any((other <= one).all() and (other < one).any() for other in points) for one in points
    ]
    expected = {tuple(p) for p, lost in zip(points, beaten, strict=True) if not lost}
    assert {tuple(points[i]) for i in kept} == expected
    assert len(kept) == len(expected)
    assert sorted(points[kept, 0]) == points[kept, 0].tolist()


def test_each_layer_has_its_own_set() -> None:
    found = made([[0.1, 0.2, 0.3, 0.9], [0.1, 0.3, 0.05, 0.9], [0.5, 0.5, 0.6, 0.4]])
    assert worth_trying(found) == [
        ("small", "middle", "large"),
        ("small", "odd"),  # smaller than "large", and better
        ("small",),
    ]


def test_layers_of_similar_errors_share_a_cluster() -> None:
    noise = np.random.default_rng(0).uniform(0.95, 1.05, (6, 4))
    kind = np.array([0, 1, 0, 1, 1, 0])
    error = np.where(kind[:, None] == 0, [[0.01, 0.1, 0.3, 0.5]], [[0.2, 1.0, 0.9, 4.0]]) * noise
    one, other = cluster(made(error.tolist()), 2)
    assert one.layers == (0, 2, 5)
    assert other.layers == (1, 3, 4)
    assert one.choices == ("large", "middle", "small")
    assert other.choices == ("large", "odd", "small")


def test_never_more_clusters_than_layers() -> None:
    error = [[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.4, 0.5]]
    assert [c.layers for c in cluster(made(error), 9)] == [(0,), (1,)]
    assert [c.layers for c in cluster(made(error[:1]), 3)] == [(0,)]


def test_cost_adds_layers_up() -> None:
    found = made([[0.1] * 4, [0.1] * 4])
    assert found.cost(["large", "small"]) == (5.0, 100.0)
    assert found.nbytes_a_bit == 20.0
