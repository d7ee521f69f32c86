"""VidKV's packing, codecs and plan."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from kvbench.cache import LayerSpec, Tokens
from kvbench.errors import UserError
from kvbench.methods.vidkv import (
    MixedChannels,
    SalientVision,
    Ternary,
    VidKV,
    WideFirst,
    pack_fives,
    unpack_fives,
)

CODECS = [
    MixedChannels(32, 32),
    MixedChannels(32, 32, "as_shipped"),
    MixedChannels(32, 32, fourier=False),
    Ternary(32, 0.7),
    Ternary(32, 0.5, "as_shipped"),
]


def test_five_codes_of_three_fill_a_byte() -> None:
    codes = torch.tensor(list(product(range(3), repeat=5)), dtype=torch.uint8)
    packed = pack_fives(codes)
    assert packed.shape == (243, 1)
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(unpack_fives(packed, 5), codes)
    for count in (1, 4, 6, 13):
        some = codes.flatten()[: 3 * count].view(3, count)
        packed = pack_fives(some)
        assert packed.shape == (3, -(-count // 5))
        assert torch.equal(unpack_fives(packed, count), some)


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_what_the_codec_says(codec: Any) -> None:
    x = torch.randn(2, 3, 64, 64)
    packed = codec.encode(x)
    assert all(part.shape[:3] == (2, 3, 2) for part in packed)
    bits = 8 * sum(part.nbytes for part in packed) / x.numel()
    assert bits == pytest.approx(codec.bits_per_element(64))
    back = codec.decode(packed, torch.float32)
    assert back.shape == x.shape


def test_bits_of_the_paper_and_of_what_was_shipped() -> None:
    """K 1.5: half at 2 + 32/32, half at 1 + 16/32, or twice as many rows; V: 1.6 or 2 + 16/32."""
    spec = LayerSpec(0, 1, 4, 2, 128)
    for compat, key, value in (("fixed", 2.25, 2.1), ("as_shipped", 3.0, 2.5)):
        layer = VidKV(compat=compat).layer(spec, None)  # type: ignore[arg-type]
        [keys], [values] = layer.key.codecs.values(), layer.value.codecs.values()
        assert keys.bits_per_element(128) == key
        assert values.bits_per_element(128) == pytest.approx(value, abs=2e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_zero_constant_and_huge_groups_stay_finite(codec: Any) -> None:
    x = torch.zeros(1, 4, 32, 64)
    x[0, 1], x[0, 2], x[0, 3, 5, 7] = 3.0, 60000.0, 1e30
    back = codec.decode(codec.encode(x), torch.float32)
    assert back.isfinite().all()
    assert (back[0, 0] == 0).all() or codec.compat == "as_shipped"


def test_a_constant_group_of_values_keeps_its_value_unless_as_shipped() -> None:
    x = torch.full((1, 1, 32, 64), -2.5)
    fixed, shipped = Ternary(32, 0.7), Ternary(32, 0.5, "as_shipped")
    assert torch.equal(fixed.decode(fixed.encode(x), torch.float32), x)
    assert (shipped.decode(shipped.encode(x), torch.float32) == -1).all()


def test_repairing_the_defects_lowers_the_error() -> None:
    x = torch.randn(1, 2, 320, 64, generator=torch.Generator().manual_seed(0))

    def error(codec: Any) -> float:
        return float((codec.decode(codec.encode(x), torch.float32) - x).square().mean())

    assert error(CODECS[0]) < 0.7 * error(CODECS[1])
    small = 0.01 * x
    fixed, shipped = (c.decode(c.encode(small), torch.float32) for c in CODECS[3:])
    assert (fixed - small).norm() < 0.8 * small.norm() < (shipped - small).norm()


def test_channels_are_sorted_by_the_range_of_the_prompt_without_padding() -> None:
    x = torch.randn(2, 3, 20, 16) * torch.arange(1, 17)
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, :6] = False
    x[1, :, :6, 0] = 1e6
    fitted = WideFirst().fit(x, Tokens(valid))
    stored = fitted.store(x)
    for row, start in ((0, 0), (1, 6)):
        spread = stored[row, :, start:].amax((0, 1)) - stored[row, :, start:].amin((0, 1))
        assert (spread.diff() <= 0).all()
    query = torch.randn(2, 6, 4, 16)
    torch.testing.assert_close(
        fitted.attend(query).unflatten(1, (3, 2)) @ stored[:, :, None].mT,
        query.unflatten(1, (3, 2)) @ x[:, :, None].mT,
    )
    picked = fitted.select(torch.tensor([1, 1]))
    assert torch.equal(picked.store(x[[1, 1]]), stored[[1, 1]])
    assert fitted.row_nbytes() == 32


@pytest.mark.parametrize(("compat", "count"), [("fixed", 16), ("as_shipped", 8)])
def test_vision_tokens_that_look_like_text_are_salient(compat: Any, count: int) -> None:
    """Of 30 vision tokens, 0.6 and whole eights; the code drops its last group."""
    vision = torch.zeros(1, 43, dtype=torch.bool)
    vision[0, 5:35] = True
    stream = torch.randn(1, 43, 8, generator=torch.Generator().manual_seed(0))
    tiers = SalientVision(0.6, 8, compat).prompt(Tokens(torch.ones_like(vision), vision, stream))[0]
    text = stream[0][~vision[0]].mean(0)
    scores = (stream[0] @ text).masked_fill(~vision[0], -torch.inf)
    chosen = (tiers == 2).nonzero().flatten()
    assert chosen.tolist() == sorted(scores.topk(count).indices.tolist())
    assert set(tiers.tolist()) == {1, 2}


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(UserError, match="lower key_bits"):
        MixedChannels(32, 32).check(32)
    with pytest.raises(UserError, match="33 channels of 1 bits"):
        MixedChannels(32, 32).check(65)
