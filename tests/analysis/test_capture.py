"""What the visitor is shown is what the model computes, held against eager attention and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from kvbench.analysis.attention import weight_blocks
from kvbench.analysis.capture import LayerView, watch
from kvbench.cache.specs import layer_specs
from kvbench.evaluation import choices
from kvbench.models.inputs import ModelInputs, encode
from kvbench.models.load import LoadedModel, load_model


def eager(model: Any, inputs: ModelInputs) -> Any:
    """Attention weights, hidden states and logits by transformers' eager attention."""
    config = model.config
    nested = config.get_text_config(decoder=True) is not config
    before = config.get_text_config(decoder=True)._attn_implementation
    model.set_attn_implementation({"text_config": "eager"} if nested else "eager")
    with torch.no_grad():
        out = model(
            **inputs.kwargs(), output_attentions=True, output_hidden_states=True, use_cache=False
        )
    model.set_attn_implementation({"text_config": before} if nested else before)
    return out


def views_of(model: Any, inputs: ModelInputs) -> tuple[list[LayerView], Any]:
    views: list[LayerView] = []
    specs = layer_specs(model.config)
    return views, watch(model, specs, inputs, views.append)


def text_inputs(length: int) -> ModelInputs:
    ids = torch.randint(9, 200, (1, length), generator=torch.Generator().manual_seed(1))
    return ModelInputs(ids, torch.ones_like(ids), torch.zeros(1, length).bool(), (length,))


def test_shows_what_a_vision_model_computes(loaded: LoadedModel, inputs: ModelInputs) -> None:
    expected = eager(loaded.model, inputs)
    views, watched = views_of(loaded.model, inputs)
    assert [view.spec.index for view in views] == [0, 1, 2]
    for view, weights, hidden in zip(
        views, expected.attentions, expected.hidden_states, strict=False
    ):
        found = torch.cat([block for _, block in weight_blocks(view)], 1)
        torch.testing.assert_close(found, weights[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(view.residual, hidden[0], rtol=1e-4, atol=1e-4)
        values = view.values.repeat_interleave(2, 0)
        torch.testing.assert_close(view.attend(), weights[0] @ values, rtol=1e-4, atol=1e-4)
    logits = watched.last_token([{}, {}])
    torch.testing.assert_close(logits[0], expected.logits[0, -1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits[1], logits[0])


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_last_token_of_text_models(tiny_text_model: Callable[..., Any], kind: str) -> None:
    window = 9 if kind == "mistral" else None
    model = tiny_text_model(kind, sliding_window=window).model
    inputs = text_inputs(30)
    expected = eager(model, inputs)
    views, watched = views_of(model, inputs)
    found = torch.cat([block for _, block in weight_blocks(views[1])], 1)
    torch.testing.assert_close(found, expected.attentions[1][0], rtol=1e-4, atol=1e-5)
    logits = watched.last_token([{}])
    torch.testing.assert_close(logits[0], expected.logits[0, -1], rtol=1e-3, atol=1e-3)


def test_a_replaced_attention_output_reaches_the_logits(
    loaded: LoadedModel, inputs: ModelInputs
) -> None:
    """The same as a hook that changes the last token's input of one output projection."""
    model = loaded.model
    given = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))

    def change(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        changed = args[0].clone()
        changed[:, -1] = given.flatten()
        return (changed,)

    layer = model.model.language_model.layers[1].self_attn.o_proj
    handle = layer.register_forward_pre_hook(change)
    with torch.no_grad():
        expected = model(**inputs.kwargs(), use_cache=False).logits[0, -1]
    handle.remove()
    _, watched = views_of(model, inputs)
    exact, replaced = watched.last_token([{}, {1: given}])
    torch.testing.assert_close(replaced, expected, rtol=1e-3, atol=1e-3)
    assert (exact - replaced).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next"])
def test_last_token_of_other_families(family: str, request: pytest.FixtureRequest) -> None:
    """Positions go on behind images, also where they are of three axes."""
    folder = request.getfixturevalue(f"tiny_{family}_folder")
    loaded = load_model(choices.choose_models(f"tiny={folder}")[0])
    inputs = encode(loaded, "See <ImageHere> now?", [Image.new("RGB", (70, 56), "blue")])
    with torch.no_grad():
        expected = loaded.model(**inputs.kwargs(), use_cache=False).logits[0, -1]
    views, watched = views_of(loaded.model, inputs)
    assert len(views) == 3
    torch.testing.assert_close(watched.last_token([{}])[0], expected, rtol=1e-3, atol=1e-3)
