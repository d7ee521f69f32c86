"""CalibQuant's two levels and its remapped logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvbench.cache import EXACT, LayerSpec
from kvbench.errors import UserError
from kvbench.methods.calibquant import CalibQuant

SPEC = LayerSpec(0, 1, 4, 2, 16)


def states(random_states: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    vision = torch.zeros(1, 40, dtype=torch.bool)
    vision[0, 4:13], vision[0, 20:31] = True, True
    return [x.double() for x in random_states(40)], vision


def test_a_channel_has_two_levels_and_text_is_exact(driver, random_states) -> None:
    given, vision = states(random_states)
    drive = driver(CalibQuant(), SPEC, "quantized_prefill")
    drive.step(*given, vision=vision)
    for store, x, shrink in (
        (drive.layer.key_store, given[1], 0.5),
        (drive.layer.value_store, given[2], 0.3),
    ):
        assert store.segments[1].lengths == (20,) and store.segments[EXACT].lengths == (20,)
        back = store.segments[1].read(torch.float64).data
        real = x[:, :, vision[0]]
        torch.testing.assert_close(back.amin(2), shrink * real.amin(2), atol=4e-3, rtol=1e-3)
        torch.testing.assert_close(back.amax(2), shrink * real.amax(2), atol=4e-3, rtol=1e-3)
        assert max(len(channel.unique()) for channel in back[0].mT.flatten(0, 1)) == 2
        assert torch.equal(store.segments[EXACT].read(torch.float64).data, x[:, :, ~vision[0]])


@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_logits_of_vision_tokens_are_remapped(driver, random_states, protocol: str) -> None:
    """What a decode step attends with, written out."""
    given, vision = states(random_states)
    drive = driver(CalibQuant(), SPEC, protocol)
    drive.step(*given, vision=vision)
    query, key, value = (torch.randn(1, h, 1, 16, dtype=torch.float64) for h in (4, 2, 2))
    query *= 3
    out = drive.step(query, key, value, vision=torch.zeros(1, 1, dtype=torch.bool))
    keys, values = (side.data[0].numpy() for side in drive.layer.read())
    place = np.zeros(41, dtype=bool)
    place[:20] = True  # segments stand in the order of their tiers
    changed = 0
    for head in range(4):
        logits = keys[head // 2] @ query[0, head, 0].numpy() / 4
        low, high = logits[place].min(), logits[place].max()
        slope = max(high - low - 3, 0) / (high - low + 1e-8)
        changed += slope > 0
        logits[place] = (logits[place] - low) * slope + low
        weights = np.exp(logits - logits.max())
        expected = weights @ values[head // 2] / weights.sum()
        np.testing.assert_allclose(out[0, head, 0], expected, atol=1e-6)
    assert changed


def test_the_map_keeps_the_minimum_and_lowers_the_maximum() -> None:
    mask = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
    logits = torch.tensor([[1.0, 9.0, 20.0, 5.0], [1.0, 2.0, 3.0, 1.5]]).view(1, 2, 1, 4)
    method = CalibQuant()
    got = method.layer(SPEC, None).logit_maps[1](logits, mask)[0, :, 0]
    torch.testing.assert_close(got[0], torch.tensor([1.0, 6.0, 20.0, 3.5]))
    torch.testing.assert_close(got[1], torch.tensor([1.0, 1.0, 3.0, 1.0]))
    nothing = method.layer(SPEC, None).logit_maps[1](logits, torch.zeros_like(mask))
    assert torch.equal(nothing, logits)


def test_maps_are_for_one_and_two_bits_and_can_be_left_out() -> None:
    assert [bool(CalibQuant(bits=b).layer(SPEC, None).logit_maps) for b in (1, 2, 4)] == [  # type: ignore[arg-type]
        True,
        True,
        False,
    ]
    assert not CalibQuant(calibrate=False).layer(SPEC, None).logit_maps


def test_channels_must_fill_bytes() -> None:
    [codec] = CalibQuant().layer(SPEC, None).key.codecs.values()
    with pytest.raises(UserError, match="65 channels"):
        codec.check(65)
