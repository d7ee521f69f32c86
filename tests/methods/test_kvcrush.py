"""KVCrush's share of tokens, and the methods that it can stand before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvbench.cache import LayerSpec
from kvbench.errors import UserError
from kvbench.methods.kvcrush import KVCrush
from kvbench.registry import METHODS, parse_spec
from tests.methods.stepwise import HEADS, KV_HEADS, WIDTH, made


@pytest.mark.parametrize("anchor", ["random", "mean", "zeros", "ones", "alternate"])
def test_kvcrush_keeps_its_share_whatever_the_anchor(
    driver: Any, random_states: Any, anchor: str
) -> None:
    method = replace(METHODS.get("kvcrush"), anchor=anchor, start=2, recent=5, keep=0.4)  # type: ignore[type-var]
    drive = driver(method, LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH), "exact_prefill")
    drive.step(*random_states(50))
    assert drive.layer.key_store.lengths == (20,)
    assert drive.layer.elements == [2 * KV_HEADS * 50 * WIDTH]


def test_a_plus_puts_a_method_behind_another() -> None:
    short, long = (
        "kvcrush[keep=0.5]+akvq_vl[recent=64]",
        "kvcrush[keep=0.5,base=akvq_vl[recent=64]]",
    )
    assert parse_spec(short) == parse_spec(long)
    assert made("kvcrush+rtn_int4") == KVCrush(base="rtn_int4")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvcrush+rtn_int5", "did you mean"),
        ("kvcrush+kvcrush", "own base"),
        ("kvcrush+hf_dynamic", "cache of its own"),
        ("kvcrush[base=rtn_int4]+rtn_int2", "either side"),
        ("kvcrush+", "either side"),
        ("rtn_int4+kvcrush", "unknown parameter 'base'"),
        ("kvcrush+rtn_int4[bits=many]", "whole number"),
    ],
)
def test_bad_combinations_are_told_in_a_sentence(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(spec)


def test_a_base_that_evicts_is_refused() -> None:
    method = made("kvcrush+zipvl[drop=true]")
    with pytest.raises(UserError, match="evicts"):
        method.layer(LayerSpec(0, 1, HEADS, KV_HEADS, WIDTH), None)
