"""What can't be stored is refused when the cache is made, in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3nTextConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
    T5Config,
)

from kvbench import quantized_cache
from kvbench.cache import (
    EXACT,
    Affine,
    Calibration,
    Exact,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Residual,
    Side,
    Sliding,
    Uniform,
    bind,
)
from kvbench.cache.specs import layer_specs
from kvbench.errors import UserError


def test_specs_of_a_grouped_query_model() -> None:
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
    )
    specs = layer_specs(config, text_salient_layers=(0, 2))
    assert specs == [
        LayerSpec(index, 3, 4, 2, 16, text_salient=index != 1, sliding_window=None)
        for index in range(3)
    ]


def test_specs_know_windows() -> None:
    small = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=3, head_dim=24)
    mistral = layer_specs(MistralConfig(**small, num_key_value_heads=4, sliding_window=7))
    assert [spec.sliding_window for spec in mistral] == [7, 7, 7]
    assert {spec.head_dim for spec in mistral} == {24}
    mixed = Qwen2Config(**small, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    assert [spec.sliding_window for spec in layer_specs(mixed)] == [None, 9, 9]
    assert [spec.sliding_window for spec in layer_specs(Qwen2Config(**small))] == [None] * 3


def test_specs_of_a_vision_model_are_its_decoders() -> None:
    text = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=5)
    assert len(layer_specs(LlavaConfig(text_config=text))) == 5


@pytest.mark.parametrize(
    "config",
    [
        DeepseekV3Config(),  # multi-head latent attention
        Qwen3NextConfig(),  # linear attention layers
        Llama4TextConfig(),  # chunked attention
        MambaConfig(),  # no attention
        T5Config(),  # encoder and decoder
        Gemma3nTextConfig(),  # layers that share a cache
    ],
    ids=lambda config: config.model_type,
)
def test_other_kinds_of_cache_are_refused(config: Any) -> None:
    with pytest.raises(UserError, match=config.model_type):
        layer_specs(config)
    with pytest.raises(UserError, match=config.model_type):
        quantized_cache(SimpleNamespace(config=config), "fp16")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Composed:
    """A method made of given parts."""

    key: Side
    value: Side
    plan: Any
    label: ClassVar[str] = "composed"
    paper: ClassVar[str] = "-"
    needs: ClassVar[Needs] = Needs()

    def layer(self, spec: LayerSpec, calibration: Any) -> LayerQuantizer:
        return LayerQuantizer(self.key, self.value, self.plan)


TOKENS = Affine(2, 8, along="tokens", zero="float")
CHANNELS = Affine(2, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (Side({2: Affine(2, 5)}), Side({2: CHANNELS})),  # groups that don't divide the channels
        (Side({5: Affine(5, 8)}), Side({5: Affine(5, 8)})),  # bits that can't be packed
        (Side({2: Affine(2, (5, 6))}), Side({2: CHANNELS})),  # uneven groups of too few channels
        (Side({2: TOKENS}), Side({2: TOKENS})),  # groups of tokens and no window
        (Side({2: TOKENS}, window=Sliding(16)), Side({2: CHANNELS}, window=Sliding(16))),
        (Side({2: TOKENS}, window=Residual(12)), Side({2: CHANNELS}, window=Residual(12))),
        (Side({2: TOKENS}, window=Residual(16, prompt_block=4)), Side({2: CHANNELS})),
        (Side({2: TOKENS}, window=Sliding(16, flush_every=8, prompt=False)), Side({2: CHANNELS})),
        (Side({2: CHANNELS, 4: Affine(4, 8)}), Side({2: CHANNELS})),  # bits of one side only
        (
            Side({2: CHANNELS, 4: Affine(4, 8)}, window=Sliding(8)),
            Side({2: CHANNELS, 4: Affine(4, 8)}, window=Sliding(9)),
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(tiny_text_model, key: Side, value: Side) -> None:
    with pytest.raises(UserError):
        bind(tiny_text_model().model, Composed(key, value, Uniform(2)))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            lambda: [][1],
            r"fails for layer 0 \(IndexError: .*test_support\.py:\d+\): repair",
        ),
        (lambda: None, "returns a NoneType for layer 0: it must return a LayerQuantizer"),
    ],
)
def test_a_method_with_a_mistake_is_named(
    tiny_text_model: Any, result: Callable[[], Any], words: str
) -> None:
    @dataclass(frozen=True)
    class Broken(Composed):
        def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
            return result()

    side = Side({2: CHANNELS})
    with pytest.raises(UserError, match=r"layer\(\) of Broken " + words):
        bind(tiny_text_model().model, Broken(side, side, Uniform(2)))


def prefill(model: Any, method: Any) -> None:
    with torch.no_grad():
        model(torch.arange(20, 50)[None], past_key_values=quantized_cache(model, method))


def test_plans_are_held_to_the_codecs(tiny_text_model) -> None:
    model = tiny_text_model().model
    with pytest.raises(UserError, match="4-bit keys"):
        prefill(model, Composed(Side({2: CHANNELS}), Side({2: CHANNELS}), Uniform(4)))


def test_exact_tokens_amid_packed_ones_need_one_window_for_both_sides(tiny_text_model) -> None:
    """Else keys and values would be read in different orders."""
    key, value = Side({2: CHANNELS}, window=Sliding(4)), Side({2: CHANNELS}, window=Sliding(8))
    model = tiny_text_model().model
    prefill(model, Composed(key, value, Uniform(2)))
    prefill(model, Composed(key, value, Uniform(EXACT)))
    with pytest.raises(UserError, match="share their window"):
        prefill(model, Composed(key, value, Uniform(2, sinks=2)))


def test_groups_of_tokens_are_never_torn(tiny_text_model) -> None:
    """Sinks leave 14 of the 16 tokens that leave the window together."""
    side = Side({2: TOKENS}, window=Residual(16))
    with pytest.raises(UserError, match="whole groups"):
        prefill(tiny_text_model().model, Composed(side, side, Uniform(2, sinks=2)))


def test_sliding_groups_of_tokens_work(tiny_text_model) -> None:
    side = Side({2: TOKENS}, window=Sliding(10, flush_every=8))
    prefill(tiny_text_model().model, Composed(side, side, Uniform(2)))


def test_a_codec_that_keeps_everything_can_be_named() -> None:
    assert Exact().bits_per_element(7) == 16.0


def test_learned_attention_sinks_are_refused(tiny_text_model) -> None:
    model = tiny_text_model().model
    cache = quantized_cache(model, "fp16")
    states = torch.zeros(1, 2, 3, 16)
    step, _ = cache.layers[0].update(states, states)
    with pytest.raises(UserError, match="sinks"):
        cache.layers[0].attend(
            model, torch.zeros(1, 4, 3, 16), step, None, 1.0, s_aux=torch.ones(4)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="rtn_int5"), "did you mean"),
        (dict(method="akvq_vl[recents=64]"), "did you mean recent"),
        (dict(method="akvq_vl[recent=many]"), "whole number"),
        (dict(method="rtn_int4", protocol="exact"), "unknown protocol"),
        (dict(method="skvq"), "calibrate"),
        (dict(method="smoothquant"), "calibrate"),
    ],
)
def test_bad_arguments_are_named(tiny_text_model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantized_cache(tiny_text_model().model, **options)


def test_only_the_decoder_takes_the_attention_that_reads_caches(tiny_llava) -> None:
    quantized_cache(tiny_llava.model, "fp16")
    assert tiny_llava.model.config.text_config._attn_implementation == "kvbench"
    assert tiny_llava.model.config.vision_config._attn_implementation != "kvbench"
