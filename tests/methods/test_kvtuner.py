"""KVTuner's table: from a preset or typed, one pair a layer, and its official rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvbench.cache import Affine, LayerSpec, LayerwiseQuantizer
from kvbench.errors import UserError
from kvbench.evaluation.choices import choose_methods
from kvbench.methods.kvtuner import KVTuner


def preset(path: Path, **parameters: Any) -> Path:
    given = {"pairs": "K84V42", "scheme": "kivi", "group_size": 16, "residual": 64, "preset": ""}
    path.write_text(json.dumps({"parameters": {**given, **parameters}, "model": "any"}))
    return path


def bits(method: KVTuner, layers: int) -> list[tuple[int, int]]:
    quantizers = [method.layer(LayerSpec(i, layers, 4, 2, 16), None) for i in range(layers)]
    return [
        tuple(next(iter(side.codecs.values())).bits for side in (q.key, q.value))  # type: ignore[misc]
        for q in quantizers
    ]


def test_a_digit_a_layer() -> None:
    assert bits(KVTuner(pairs="K884V422"), 3) == [(8, 4), (8, 2), (4, 2)]
    assert bits(KVTuner(pairs="K4V2"), 3) == [(4, 2)] * 3
    with pytest.raises(UserError, match="3 layers where the model has 2"):
        bits(KVTuner(pairs="K884V422"), 2)


def test_choices_of_layers_and_back() -> None:
    method = KVTuner(scheme="kivi")
    assert isinstance(method, LayerwiseQuantizer)
    assert len(set(method.layer_choices)) == 9
    mixed = method.with_layers(["K8V4", "K2V8"])
    assert (mixed.pairs, mixed.scheme) == ("K82V48", "kivi")
    assert method.with_layers(["K4V2"] * 5).pairs == "K4V2"


def test_a_preset_becomes_its_table(tmp_path: Path) -> None:
    path = preset(tmp_path / "preset.json")
    (choice,) = choose_methods(f"kvtuner[preset={path}]")
    table = "group_size=16,pairs=K84V42,residual=64,scheme=kivi"
    assert choice.spec == f"kvtuner[{table}]"
    path.unlink()  # what was chosen does not change with the file
    assert choose_methods(choice.spec) == (choice,)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"parameters": {"pairs": "K4V4"}}', "can't be read"),
        (None, "can't be read"),
    ],
)
def test_a_broken_preset_is_one_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "preset.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        KVTuner(preset=str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_in_a_preset_are_checked(tmp_path: Path) -> None:
    for wrong in ({"pairs": "K3V3"}, {"pairs": 4}, {"scheme": "other"}, {"residual": 40}):
        with pytest.raises(UserError):
            KVTuner(preset=str(preset(tmp_path / "preset.json", **wrong)))
    with pytest.raises(UserError, match="not from both"):
        KVTuner(pairs="K4V4", preset=str(preset(tmp_path / "preset.json")))


@pytest.mark.parametrize("width", [2, 4, 8])
def test_rounding_is_the_official_one(width: int) -> None:
    """F3: signed codes and a zero point shifted by half of the codes, in float64."""
    x = torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(width)) * 3 + 0.7
    codec = Affine(width, 64)
    mine = codec.decode(codec.encode(x), torch.float32).double().numpy()
    values = x.double().numpy()
    low, high = values.min(-1, keepdims=True), values.max(-1, keepdims=True)
    scale = np.maximum(high - low, 1e-5) / (2**width - 1)
    scale = scale.astype(np.float16).astype(np.float64)  # as stored
    half = 2 ** (width - 1)
    zero = np.rint(low / scale) + half
    codes = np.clip(np.rint(values / scale - zero), -half, half - 1)
    official = (codes + zero) * scale
    assert np.mean(np.abs(mine - official) > 1e-5) < 1e-3  # exact ties
