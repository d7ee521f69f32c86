"""Errors of stored states against formulas in numpy, and the influence of a single layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvbench.analysis.capture import LayerView, watch
from kvbench.analysis.errors import LayerError, layer_error
from kvbench.analysis.influence import influences, prompt_influences
from kvbench.cache import (
    EXACT,
    BoundMethod,
    ChannelScale,
    LayerQuantizer,
    MergeHeads,
    Rotate,
    Side,
    Transform,
    Uniform,
    bind,
)
from kvbench.evaluation.decode import prefill
from kvbench.models.inputs import ModelInputs
from kvbench.models.load import LoadedModel
from kvbench.registry import METHODS


def bound(quantizer: LayerQuantizer, view: LayerView) -> BoundMethod:
    """A method of one layer, without a model."""
    model: Any = None
    method: Any = METHODS.get("fp16")
    return BoundMethod(model, (quantizer,), (view.spec,), method, "quantized_prefill")


@pytest.mark.parametrize("kind", ["identity", "rotate", "scale", "merge"])
def test_exact_storage_in_any_basis_has_no_error(make_view: Any, kind: str) -> None:
    view: LayerView = make_view()
    spec = view.spec
    scale = torch.rand(spec.num_kv_heads, spec.head_dim) * 9 + 0.1
    order = torch.randperm(spec.num_kv_heads * spec.head_dim)
    transforms: dict[str, tuple[Transform, Transform]] = {
        "identity": (Transform(), Transform()),
        "rotate": (Rotate(8, "key"), Rotate(8, "value")),
        "scale": (ChannelScale(scale), ChannelScale(scale)),
        "merge": (MergeHeads(spec, order), MergeHeads(spec, order)),
    }
    key, value = transforms[kind]
    quantizer = LayerQuantizer(Side(transform=key), Side(transform=value), Uniform(EXACT))
    error = layer_error(replace(view, attend=lambda: exact_output(view)), bound(quantizer, view))
    assert max(error.key, error.value, error.output) < 1e-5
    torch.testing.assert_close(error.last, exact_output(view)[:, -1], rtol=1e-4, atol=1e-4)


def exact_output(view: LayerView) -> torch.Tensor:
    """Plain causal attention, (Hq, T, D)."""
    keys, values = (side.repeat_interleave(2, 0) for side in (view.keys, view.values))
    tokens = keys.shape[1]
    logits = view.query @ keys.transpose(1, 2) * view.scaling
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def test_error_of_round_to_nearest(make_view: Any) -> None:
    """Two bits per token and head with an integer zero point, written out in numpy."""
    view: LayerView = make_view()
    quantizer = METHODS.get("rtn_int2").layer(view.spec, None)  # type: ignore[union-attr]
    error = layer_error(replace(view, attend=lambda: exact_output(view)), bound(quantizer, view))
    for states, found in ((view.keys, error.key), (view.values, error.value)):
        x = states.double().numpy()
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        scale = ((high - low) / 3).astype(np.float16).astype(np.float64)
        zero = -np.rint(low / scale)
        stored = scale * (np.clip(np.rint(x / scale) + zero, 0, 3) - zero)
        expected = np.linalg.norm(stored - x) / np.linalg.norm(x)
        assert found == pytest.approx(expected, rel=1e-3)
    assert error.output > 0.05


def errors_of(
    loaded: LoadedModel, inputs: ModelInputs, method: BoundMethod
) -> tuple[Any, list[LayerError]]:
    found: list[LayerError] = []
    specs = list(method.specs)
    watched = watch(loaded.model, specs, inputs, lambda v: found.append(layer_error(v, method)))
    return watched, found


@pytest.mark.parametrize(
    "name", ["rtn_int2", "akvq_vl[recent=8,pivots=3]", "kivi[residual=16,group_size=16]"]
)
def test_influence_is_that_of_a_cache_with_one_quantized_layer(
    loaded: LoadedModel, inputs: ModelInputs, name: str
) -> None:
    """The short cut of one decode step against the real cache under exact_prefill."""
    method = bind(loaded.model, name, text_salient_layers=(0,))
    watched, errors = errors_of(loaded, inputs, method)
    found = influences(watched, {name: [error.last for error in errors]})[name]
    deployed = bind(loaded.model, name, protocol="exact_prefill", text_salient_layers=(0,))
    expected = prompt_influences(inputs, deployed)
    assert len(found) == 3
    for mine, real in zip(found, expected, strict=True):
        assert mine.divergence == pytest.approx(real.divergence, rel=0.02, abs=1e-6)
        assert mine.changed == real.changed
    assert max(one.divergence for one in found) > 1e-4


def test_influence_on_the_whole_prompt(loaded: LoadedModel, inputs: ModelInputs) -> None:
    method = bind(loaded.model, "rtn_int2")
    found = prompt_influences(inputs, method)
    exact = LayerQuantizer(Side(), Side(), Uniform(EXACT))
    only_second = replace(method, quantizers=(exact, method.quantizers[1], exact))
    none = replace(method, quantizers=(exact,) * 3)
    p, q = (prefill(loaded.model, inputs, m.new_cache())[0] for m in (none, only_second))
    log_p, log_q = p.double().log_softmax(-1).numpy(), q.double().log_softmax(-1).numpy()
    expected = float((np.exp(log_p) * (log_p - log_q)).sum())
    assert found[1].divergence == pytest.approx(expected, rel=1e-6)
