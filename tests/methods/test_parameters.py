"""Every hyper-parameter can be set from text, and none to nonsense."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

from kvbench import quantized_cache
from kvbench.errors import UserError
from kvbench.registry import METHODS, canonical_spec, configured, parse_spec

OTHER: dict[str, str] = {
    # A value that differs from every method's default, where the type alone doesn't give one.
    "bits": "8",
    "text_bits": "8",
    "group_size": "16",
    "heads": "2",
    "static": "1.0",
    "salient": "0.25",
    "key_bits": "1.25",
    "residual": "256",
    "alpha": "0.25",
    "clip": "0.75",
    "text_clip": "0.9",
    "base": "rtn_int4",
    "pairs": "K4V2",
}


def fields() -> list[tuple[str, str, Any]]:
    found = []
    for name in METHODS.names():
        method = METHODS.get(name)
        hints = typing.get_type_hints(type(method))
        found += [(name, f.name, hints[f.name]) for f in dataclasses.fields(method)]  # type: ignore[arg-type]
    found.remove(("rtn_int2_wht", "group_over_heads", bool))  # excludes its rotation
    found.remove(("kvtuner", "preset", str))  # a file, whose content takes its place
    return found


def other_value(name: str, kind: Any, default: Any) -> str:
    """Text of a value that isn't the default."""
    if kind is bool:
        return str(not default).lower()
    if get_origin(kind) is Literal:
        return str(next(choice for choice in get_args(kind) if choice != default))
    if name in OTHER:
        return OTHER[name]
    return str(default + 1) if kind is int else str(default / 2)


def without_none(kind: Any) -> Any:
    """`float` of `float | None`."""
    return get_args(kind)[0] if get_origin(kind) is types.UnionType else kind


@pytest.mark.parametrize(("name", "field", "kind"), fields())
def test_every_field_is_reachable_from_text(name: str, field: str, kind: Any) -> None:
    method = METHODS.get(name)
    default = getattr(method, field)
    text = other_value(field, kind, default)
    changed = configured(method, {field: text})
    assert getattr(changed, field) != default
    assert str(getattr(changed, field)).lower() == text.lower()
    assert canonical_spec(name, method, changed) == f"{name}[{field}={text}]"
    assert configured(method, parse_spec(canonical_spec(name, method, changed))[1]) == changed


BAD = {
    int: ["1.5", "many", "", "1e3"],
    float: ["half", "nan", "inf"],
    bool: ["2", "maybe"],
    str: ["no_such_method"],
}


@pytest.mark.parametrize(("name", "field", "kind"), fields())
def test_text_of_another_kind_is_refused(name: str, field: str, kind: Any) -> None:
    choices = get_origin(kind) is Literal
    for text in ["none of them"] if choices else BAD[without_none(kind)]:
        with pytest.raises(UserError, match=field):
            configured(METHODS.get(name), {field: text})


@pytest.mark.parametrize(("name", "field", "kind"), fields())
def test_python_values_of_another_kind_are_refused(name: str, field: str, kind: Any) -> None:
    wrong: list[Any] = [2.5 if kind is str else "2", float("nan"), [1]]
    if kind is without_none(kind):
        wrong.append(None)
    if kind is int:
        wrong += [2.5, True]
    for value in wrong:
        with pytest.raises(UserError, match=field):
            dataclasses.replace(METHODS.get(name), **{field: value})  # type: ignore[type-var]


OUT_OF_RANGE = [
    *(
        f"{name}[bits={bits}]"
        for name in ("rtn_int4", "kivi", "skvq[reorder=false]", "akvq_vl")
        for bits in (0, -1, 5, 6, 16)
    ),
    *(f"{name}[group_size={size}]" for name in ("rtn_int4", "kivi", "akvq_vl") for size in (0, -8)),
    "rtn_int4[group_size=7]",
    "akvq_vl[group_size=7]",
    "rtn_int4[clip=0]",
    "rtn_int4[clip=-0.5]",
    "rtn_int4[clip=1.5]",
    "rtn_int4[hadamard=true,group_over_heads=true]",
    "kivi[residual=0]",
    "kivi[residual=-128]",
    "kivi[residual=100]",
    "kivi[group_size=96]",
    "kivi[group_size=7,residual=7]",  # values: groups of channels
    "akvq_vl[recent=-1]",
    "akvq_vl[pivots=-1]",
    "akvq_vl[clip=0]",
    "akvq_vl[text_clip=2]",
    "akvq_vl[bits=4]",  # as text_bits
    "akvq_vl[text_bits=5]",
    "akvq_vl[flush_every=0]",
    "skvq[reorder=false,window=-1]",
    "skvq[reorder=false,sinks=-1]",
    "skvq[reorder=false,clip=0]",
    "skvq[reorder=false,seed=-1]",
    "skvq[reorder=false,group_size=0]",
    "kvtuner[pairs=K3V4]",
    "kvtuner[pairs=K88V4]",
    "kvtuner[pairs=K884V422]",  # the model has two layers
    "kvtuner[pairs=8]",
    "kvtuner[residual=0]",
    "kvtuner[residual=48]",
    "kvtuner[group_size=0]",
    "kvtuner[preset=no/such/file]",
    "kvtuner[pairs=K2V2,preset=no/such/file]",
    "smoothquant[alpha=-0.1]",
    "smoothquant[alpha=1.1]",
    "smoothquant[bits=5]",
    "smoothquant[group_size=0]",
    "fp8[static=-1.0]",
    "nvfp4[static=-1.0]",
    "quarot_kv[bits=6]",
    "quarot_kv[clip=0]",
    "turboquant_3bit_nc[skip_layers=-1]",
    "turboquant_paper[seed=-1]",
    "oscar[sinks=-1]",
    "oscar[recent=-1]",
    "oscar[flush_every=0]",
    "oscar[key_keep=1.5]",
    "oscar[value_keep=-0.1]",
    "oscar[group_size=0]",
    "rotatekv[heads=3]",
    "rotatekv[pivots=-1]",
    "rotatekv[clip=0]",
    "vidkv[key_bits=2.0]",
    "vidkv[residual=100]",
    "vidkv[salient=1.5]",
    "calibquant[key_shrink=0]",
    "calibquant[value_shrink=1.5]",
    "mikv[ratio=1.5]",
    "mikv[recent_share=-1.0]",
    "mikv[group_size=-1]",
    "mikv[group_size=7]",
    "mikv[bits=5]",
    "zipcache[unimportant=1.1]",
    "zipcache[probes=0.0]",
    "zipcache[bits=2]",
    "zipcache[bits=5]",
    "zipcache[stream=0]",
    "zipvl[tau=0.0]",
    "zipvl[recent_probes=0]",
    "zipvl[low_bits=4]",
    "zipvl[stream=0]",
    "kvcrush[keep=1.5]",
    "kvcrush[start=0]",
    "kvcrush[recent=0]",
    "kvcrush[seed=-1]",
    "kvcrush+rtn_int9",
]


def spec(text: str) -> str:
    """Join the brackets of a name that already has parameters."""
    return text.replace("][", ",")


@pytest.mark.parametrize("text", OUT_OF_RANGE)
def test_values_out_of_range_are_refused_when_the_cache_is_made(
    tiny_text_model, calibrated, text: str
) -> None:
    model = tiny_text_model().model
    with pytest.raises(UserError) as caught:
        quantized_cache(model, spec(text), calibration=calibrated(model))
    message = str(caught.value)
    assert message.endswith((".", "?"))
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "akvq_vl[recent=0,pivots=0]",
        "akvq_vl[recent=12,bits=1,text_bits=8,flush_every=4]",
        "akvq_vl[recent=12,detector=elements]",
        "akvq_vl[recent=12,detector=threshold]",
        "akvq_vl[recent=12,text_layers=all,pivot_layers=all,zero=float,clip_mode=midpoint]",
        "akvq_vl[recent=12,rotation=block,window_counts_current=false]",
        "kivi[bits=1,group_size=8,residual=8]",
        "kivi[bits=8,group_size=16,residual=48,prompt_residual=false]",
        "skvq[window=12,metadata=fp8]",
        "skvq[pre_rope=false,window=0,sinks=0]",
        "skvq[window=12,group_size=5,bits=4]",
        "kvtuner[pairs=K82V48]",
        "kvtuner[pairs=K24V22,scheme=kivi,group_size=8,residual=8]",
        "smoothquant[alpha=0.0]",
        "smoothquant[alpha=1.0,zero=float]",
        "rtn_int4[bits=1]",
        "rtn_int4[bits=3]",
        "kivi[bits=3,group_size=8,residual=8]",
        "fp8[kind=e5m2]",
        "fp8[static=0.5]",
        "nvfp4[static=1.0]",
        "quarot_kv[zero=symmetric]",
        "turboquant_4bit_nc[skip_layers=0,rotate_values=true,norm_correction=false]",
        "turboquant_paper[bits=1,norm_correction=true]",
        "oscar[sinks=4,recent=12,per_head=true]",
        "oscar[sinks=0,recent=0,rotation=identity,group_size=8]",
        "rotatekv[heads=1,bits=3,compat_divisor=true]",
        "rotatekv[reorder=false,pivots=0]",
        "vidkv[group_size=8,residual=16,fourier=false]",
        "vidkv[group_size=8,residual=16,key_bits=1.5,compat=as_shipped]",
        "rtn_int4[group_over_heads=true,group_size=32]",
        "mikv[high_bits=8,bits=4,ratio=0.5,recent_share=0.2]",
        "mikv[balance=false,group_size=16,ratio=0.0]",
        "zipcache[as_shipped=true,stream=6,probes=0.3]",
        "zipcache[per_head=false,stream=6,unimportant=0.7]",
        "zipvl[drop=true,tau=0.8,stream=6,recent_probes=9]",
        "kvcrush[start=1,recent=9,keep=0.4,anchor=mean]+kivi[group_size=8,residual=16]",
        "kvcrush[start=1,recent=9,keep=0.4]+skvq[window=6]",
        "kvcrush[start=1,recent=9,keep=0.4]+akvq_vl[recent=12]",
        "kvcrush[start=1,recent=9,keep=0.4]+zipcache[stream=6]",
        "kvcrush[start=1,recent=9,keep=0.6]+mikv[ratio=0.3]",
    ],
)
@pytest.mark.parametrize("protocol", ["quantized_prefill", "exact_prefill"])
def test_other_settings_run_on_padded_batches(
    tiny_text_model, calibrated, double, text: str, protocol: str
) -> None:
    """Each against its own rows alone, so that the rarer paths are held to the same rule."""
    model = double(tiny_text_model().model)
    ids = torch.stack((torch.arange(20, 70), torch.arange(100, 150)))
    mask = torch.ones_like(ids)
    ids[1, :17], mask[1, :17] = 0, 0
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    options |= dict(return_dict_in_generate=True, output_logits=True)

    def generate(cut: Any) -> Any:
        cache = quantized_cache(model, text, protocol=protocol, calibration=calibrated(model))  # type: ignore[arg-type]
        inputs = dict(input_ids=ids[cut], attention_mask=mask[cut])
        out = model.generate(**inputs, past_key_values=cache, **options)
        assert cache.packed_tokens_read > 0
        return out

    both = generate(slice(None))
    for row, cut in enumerate([(slice(0, 1),), (slice(1, 2), slice(17, None))]):
        alone = generate(cut)
        for mine, expected in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[row], expected[0], atol=1e-9, rtol=1e-9)
