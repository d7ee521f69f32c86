"""Which choices are worth trying in a layer, and which layers can share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from kvbench.tuning.sensitivity import Numbers, Sensitivity

_SMALLEST = 1e-12


@dataclass(frozen=True)
class Cluster:
    """Layers that get the same choice.

    Attributes:
        layers: Their numbers.
        choices: What to try, the largest first.
    """

    layers: tuple[int, ...]
    choices: tuple[str, ...]


def pareto(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Places that no other beats in cost and loss, by rising cost; of equal pairs the first."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], losses[i], i))
    kept: list[int] = []
    for place in order:
        if not kept or losses[place] < losses[kept[-1]]:
            kept.append(place)
    return kept


def worth_trying(found: Sensitivity) -> list[tuple[str, ...]]:
    """Each layer's Pareto set of choices."""
    return [
        tuple(found.choices[i] for i in pareto(bits.tolist(), error.tolist()))
        for bits, error in zip(found.bits, found.error, strict=True)
    ]


def cluster(found: Sensitivity, most: int) -> list[Cluster]:
    """Layers of similar errors (agglomerative, mean distance of their logarithms).

    A cluster may take any choice that is worth trying in one of its layers.
    """
    labels = _labels(np.log(np.maximum(found.error, _SMALLEST)), most)
    sets = worth_trying(found)
    clusters = []
    for label in dict.fromkeys(labels):
        layers = tuple(i for i, mine in enumerate(labels) if mine == label)
        wanted = {choice for layer in layers for choice in sets[layer]}
        bits = found.bits[list(layers)].mean(0)
        order = np.argsort(-bits, kind="stable")
        names = tuple(found.choices[i] for i in order if found.choices[i] in wanted)
        clusters.append(Cluster(layers, names))
    return clusters


def _labels(points: Numbers, most: int) -> list[int]:
    if len(points) == 1:
        return [1]
    labels: list[int] = fcluster(linkage(points, "average"), most, "maxclust").tolist()
    return labels
