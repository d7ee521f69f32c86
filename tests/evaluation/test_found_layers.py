"""Rows of a model whose text-salient layers were changed are rows of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvbench.evaluation.rows import SampleRow


def test_other_text_salient_layers_are_other_rows(
    evaluated: Callable[..., list[SampleRow]], tiny_llava_folder: Any
) -> None:
    common: dict[str, Any] = {"methods": "akvq_vl[recent=8]", "tasks": "oe", "limit": 1}
    (plain,) = evaluated(models=f"tiny={tiny_llava_folder}", **common)
    assert plain.calibration == ""
    rows = evaluated(models=f"tiny[tsa_layers=(0,1)]={tiny_llava_folder}", **common)
    assert [row.calibration for row in rows] == ["", "tsa=0-1"]
    assert rows[1].bits_per_element != plain.bits_per_element
    again = evaluated(models=f"tiny[tsa_layers=(0,1)]={tiny_llava_folder}", **common)
    assert len(again) == 2
