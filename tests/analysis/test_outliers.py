"""Channel magnitudes and their ratios, with the transform written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvbench.analysis.outliers import magnitudes, outlier_ratio


def sylvester(order: int) -> Any:
    """H_2n = [[H, H], [H, -H]], eq. 7 of the paper, normalised."""
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(order)


def test_magnitudes_before_and_after(make_view: Any) -> None:
    view = make_view(40)
    view.keys[:, :, 3] *= 30  # a channel of outliers
    found = magnitudes(view)
    for side, states in (("keys", view.keys), ("values", view.values)):
        x = states.double().numpy()
        turned = x @ sylvester(8)
        np.testing.assert_allclose(found[side].before, np.abs(x).mean(1), rtol=1e-5)
        np.testing.assert_allclose(found[side].after, np.abs(turned).mean(1), rtol=1e-4)
        crest = (np.abs(x).max(-1) / np.sqrt((x**2).mean(-1))).mean()
        assert found[side].crest_before == pytest.approx(crest, rel=1e-5)
    assert outlier_ratio(found["keys"].before) > 15
    assert outlier_ratio(found["keys"].after) < 2


def test_outlier_ratio_is_the_mean_over_heads() -> None:
    channels = torch.tensor([[1.0, 2.0, 8.0], [3.0, 3.0, 3.0]])
    assert outlier_ratio(channels) == pytest.approx((8 / 2 + 1) / 2)
