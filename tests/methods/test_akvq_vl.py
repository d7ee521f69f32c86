"""AKVQ-VL's plan: which tokens get how many bits, in which layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvbench.cache import EXACT, LayerSpec, Tokens
from kvbench.methods.akvq_vl import AKVQVL

TEXT_SALIENT = LayerSpec(0, 4, 4, 2, 16, text_salient=True)
OTHER = LayerSpec(2, 4, 4, 2, 16)


def tokens(residual: Any = None, vision: str = "", valid: str = "", count: int = 6) -> Tokens:
    """One row; `vision` and `valid` are strings of 0 and 1."""
    mark = lambda text, default: torch.tensor(  # noqa: E731
        [[c == "1" for c in text] if text else [default] * count]
    )
    stream = None if residual is None else torch.tensor([residual], dtype=torch.float32)
    return Tokens(mark(valid, True), mark(vision, False), stream)


def bits(method: AKVQVL, spec: LayerSpec, given: Tokens) -> list[int]:
    return method.layer(spec, None).plan.prompt(given)[0].tolist()  # type: ignore[no-any-return]


STREAM = [[1.0, 2.0], [900.0, -800.0], [3.0, -700.0], [0.5, 0.5], [600.0, 0.0], [4.0, 4.0]]


def test_text_salient_layers_give_text_four_bits_and_vision_two() -> None:
    assert bits(AKVQVL(), TEXT_SALIENT, tokens(STREAM, "011100")) == [4, 2, 2, 2, 4, 4]


def test_other_layers_keep_pivots_and_give_the_rest_two_bits() -> None:
    method = AKVQVL(pivots=2)
    assert bits(method, OTHER, tokens(STREAM, "011100")) == [2, EXACT, EXACT, 2, 2, 2]
    assert bits(AKVQVL(pivots=0), OTHER, tokens(STREAM)) == [2] * 6
    assert bits(AKVQVL(pivots=99), OTHER, tokens(STREAM)) == [EXACT] * 6


def test_generated_tokens_are_text_and_never_pivots() -> None:
    new = tokens(count=1)
    assert AKVQVL().layer(TEXT_SALIENT, None).plan.generated(new).tolist() == [[4]]
    assert AKVQVL().layer(OTHER, None).plan.generated(new).tolist() == [[2]]


def test_rules_can_be_given_to_other_layers() -> None:
    everywhere = AKVQVL(text_layers="all", pivot_layers="all", pivots=1)
    for spec in (TEXT_SALIENT, OTHER):
        assert bits(everywhere, spec, tokens(STREAM, "001111")) == [4, EXACT, 2, 2, 2, 2]
    nowhere = AKVQVL(text_layers="none", pivot_layers="none")
    for spec in (TEXT_SALIENT, OTHER):
        assert bits(nowhere, spec, tokens(STREAM, "001111")) == [2] * 6


def test_the_largest_tokens_are_pivots_and_the_first_wins_a_tie() -> None:
    tied = [[5.0, 0.0], [0.0, -9.0], [9.0, 0.0], [9.0, 9.0], [1.0, 1.0], [0.0, 0.0]]
    assert bits(AKVQVL(pivots=2), OTHER, tokens(tied)) == [2, EXACT, EXACT, 2, 2, 2]


def test_elements_of_one_token_take_several_places() -> None:
    """RotateKV's rule: 900 and -800 are one token, so three elements are two tokens."""
    method = AKVQVL(pivots=3, detector="elements")
    assert bits(method, OTHER, tokens(STREAM)) == [2, EXACT, EXACT, 2, 2, 2]
    assert bits(replace(method, pivots=99), OTHER, tokens(STREAM)) == [EXACT] * 6


@pytest.mark.parametrize(
    ("row", "pivots"),
    [
        ([[0.1, 500.0], [0.1, 99.0], [0.1, 0.1], [0.1, 200.0], [0.1, 0.1], [0.1, 0.1]], [0, 3]),
        ([[0.01, 90.0], [0.01, 0.0], [0.01, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], []),
        ([[1.0, 500.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], []),
    ],
)
def test_the_threshold_is_100_and_1000_medians(row: Any, pivots: list[int]) -> None:
    """Massive activations as their discoverers define them; `pivots` is then a limit."""
    got = bits(AKVQVL(pivots=4, detector="threshold"), OTHER, tokens(row))
    assert [place for place, value in enumerate(got) if value == EXACT] == pivots
    if pivots:
        one = bits(AKVQVL(pivots=1, detector="threshold"), OTHER, tokens(row))
        assert one.count(EXACT) == 1


def test_padding_is_never_a_pivot_and_rows_have_their_own() -> None:
    stream = torch.tensor([STREAM, STREAM])
    valid = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    plan = AKVQVL(pivots=2).layer(OTHER, None).plan
    got = plan.prompt(Tokens(valid, torch.zeros_like(valid), stream))
    assert got[0, 2:].tolist() == [EXACT, 2, EXACT, 2]
    assert got[1].tolist() == [2, EXACT, EXACT, 2, 2, 2]


def test_the_steps_of_the_ablation() -> None:
    """Table III: round-to-nearest, + rotation, + text rule, + pivots (AKVQ-VL itself)."""
    from kvbench.registry import METHODS

    text_rule: Any = METHODS.get("rtn_int2_wht_tsa")
    assert bits(text_rule, TEXT_SALIENT, tokens(STREAM, "011100")) == [4, 2, 2, 2, 4, 4]
    assert bits(text_rule, OTHER, tokens(STREAM, "011100")) == [2] * 6


def test_clips_belong_to_their_bits() -> None:
    layer = AKVQVL(clip=0.7, text_clip=0.9).layer(OTHER, None)
    assert {b: codec.clip for b, codec in layer.key.codecs.items()} == {2: 0.7, 4: 0.9}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "clips"),
    [
        (AKVQVL(), {2: 0.8, 4: 1.0}),
        (AKVQVL(bits=4, text_bits=8), {4: 1.0, 8: 1.0}),
        (AKVQVL(bits=4, text_bits=2), {4: 1.0, 2: 0.8}),
        (AKVQVL(bits=8, clip=0.8), {8: 0.8, 4: 1.0}),
    ],
)
def test_the_papers_clips_follow_the_bits(method: AKVQVL, clips: dict[int, float]) -> None:
    layer = method.layer(OTHER, None)
    for side in (layer.key, layer.value):
        assert {b: codec.clip for b, codec in side.codecs.items()} == clips  # type: ignore[attr-defined]


@pytest.mark.parametrize(("head_dim", "groups"), [(64, 64), (80, 80), (128, 128), (256, 128)])
def test_groups_are_a_head_or_128(head_dim: int, groups: int) -> None:
    layer = AKVQVL().layer(replace(OTHER, head_dim=head_dim), None)
    assert {codec.group for codec in layer.value.codecs.values()} == {groups}  # type: ignore[attr-defined]


def test_paper_settings() -> None:
    method = AKVQVL()
    assert (method.recent, method.pivots) == (128, 15)
    assert (method.bits, method.text_bits, method.group_size) == (2, 4, 128)
    window = method.layer(OTHER, None).key.window
    assert window is not None
    assert [window.keep(length, 0) for length in (0, 127, 128, 129, 500)] == [0, 127, 128, 128, 128]
