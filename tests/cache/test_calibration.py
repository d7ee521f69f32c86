"""Calibrated statistics against reductions of what the projections put out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvbench import quantized_cache
from kvbench.cache import (
    Calibration,
    LayerSpec,
    calibrate_statistics,
    load_calibration,
    save_calibration,
)
from kvbench.cache.statistics import STATISTICS, statistic_shape
from kvbench.errors import UserError

MODELS: dict[str, dict[str, Any]] = {
    "llama": dict(kind="llama", layers=3),
    "bias": dict(kind="llama", bias=True),
    "mistral_window": dict(kind="mistral", sliding_window=9),
    "qwen2_windows": dict(kind="qwen2", layers=3, sliding_window=9),
    "multi_head": dict(kind="llama", heads=4, kv_heads=4),
}


def prompts() -> list[dict[str, torch.Tensor]]:
    """One prompt alone, and a padded pair; padding has the id 0, which embeds like any other."""
    pair = torch.stack((torch.arange(30, 60), torch.arange(100, 130)))
    mask = torch.ones_like(pair)
    pair[1, :12], mask[1, :12] = 0, 0
    return [
        {"input_ids": torch.arange(20, 45)[None]},
        {"input_ids": pair, "attention_mask": mask},
    ]


@contextmanager
def projections(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Outputs of every q_proj, k_proj and v_proj, by name and layer."""
    seen: dict[str, list[Any]] = {
        f"{p}{i}": [] for p in "qkv" for i in range(len(model.model.layers))
    }
    handles = []
    for index, layer in enumerate(model.model.layers):
        for letter in "qkv":
            keep = seen[f"{letter}{index}"]
            handles.append(
                getattr(layer.self_attn, f"{letter}_proj").register_forward_hook(
                    lambda _, __, out, keep=keep: keep.append(out.detach().double().numpy())
                )
            )
    yield seen
    for handle in handles:
        handle.remove()


def valid_rows(outputs: list[Any], width: int) -> np.ndarray:
    """(tokens, heads, D) of all prompts without padding."""
    real = [
        prompt.get("attention_mask", torch.ones_like(prompt["input_ids"])) for prompt in prompts()
    ]
    first_pass = zip(outputs[: len(real)], real, strict=True)
    rows = [out[mask.bool().numpy()] for out, mask in first_pass]
    return np.concatenate(rows).reshape(-1, outputs[0].shape[-1] // width, width)


@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_reductions_of_the_projections(tiny_text_model, name: str) -> None:
    model = tiny_text_model(**MODELS[name]).model
    config = model.config
    with projections(model) as seen:
        calibration = calibrate_statistics(model, prompts(), {"data": "two prompts"})
    assert set(calibration.statistics) == set(STATISTICS)
    assert calibration.manifest == {"data": "two prompts", "prompts": "2"}
    shape = (config.num_hidden_layers, config.num_key_value_heads, 16)
    for statistic, tensor in calibration.statistics.items():
        matrix = statistic.endswith("second_moment")
        assert tuple(tensor.shape) == (*shape, 16) if matrix else shape
        assert tensor.dtype == torch.float32
    for layer in range(config.num_hidden_layers):
        keys, values = (valid_rows(seen[f"{letter}{layer}"], 16) for letter in "kv")
        expected = {
            "key_min": keys.min(0),
            "key_max": keys.max(0),
            "value_min": values.min(0),
            "value_max": values.max(0),
            "value_absmax": np.abs(values).max(0),
            "key_mean": keys.mean(0),
        }
        for statistic, wanted in expected.items():
            got = calibration.of(statistic, layer).numpy()
            np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "multi_head"])
def test_magnitudes_after_rope_are_over_the_heads_of_a_group(tiny_text_model, name: str) -> None:
    """RoPE turns the pair (c, c + D / 2), so pairs keep their length and no channel exceeds it."""
    model = tiny_text_model(**MODELS[name]).model
    heads = model.config.num_key_value_heads
    with projections(model) as seen:
        calibration = calibrate_statistics(model, prompts(), {})
    queries, keys = (valid_rows(seen[f"{letter}0"], 16) for letter in "qk")
    queries = queries.reshape(len(queries), heads, -1, 16)
    for statistic, states in (("query_absmax", queries), ("key_absmax", keys[:, :, None])):
        length = np.sqrt(states[..., :8] ** 2 + states[..., 8:] ** 2).max((0, 2))
        got = calibration.of(statistic, 0).numpy()
        assert (got <= np.concatenate((length, length), -1) + 1e-4).all()
        pairs = np.maximum(got[:, :8], got[:, 8:])
        assert (pairs >= length / np.sqrt(2) - 1e-4).all()


def test_magnitudes_after_rope_follow_positions(tiny_text_model) -> None:
    """Position 0 is not turned at all: one-token prompts show the projections' own outputs."""
    model = tiny_text_model().model
    ids = [torch.tensor([[40]]), torch.tensor([[90]]), torch.tensor([[121]])]
    with projections(model) as seen:
        calibration = calibrate_statistics(model, [{"input_ids": one} for one in ids], {})
    for statistic, letter in (("query_absmax", "q"), ("key_absmax", "k")):
        states = np.abs(np.concatenate(seen[f"{letter}1"][:3])[:, 0]).reshape(3, 2, -1, 16)
        got = calibration.of(statistic, 1).numpy()
        np.testing.assert_allclose(got, states.max((0, 2)), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "multi_head"])
def test_second_moments_are_over_real_tokens(tiny_text_model, name: str) -> None:
    """One-token prompts are at position 0, where RoPE does nothing."""
    model = tiny_text_model(**MODELS[name]).model
    ids = [torch.tensor([[token]]) for token in (40, 90, 121, 33)]
    with projections(model) as seen:
        calibration = calibrate_statistics(model, ({"input_ids": one} for one in ids), {})
    heads = model.config.num_key_value_heads
    q, k, v = (
        np.concatenate(seen[f"{letter}1"])[:, 0].reshape(-1, heads, groups, 16)[:4]
        for letter, groups in (("q", 4 // heads), ("k", 1), ("v", 1))
    )
    for head in range(heads):
        queries = q[:, head].reshape(-1, 16)
        moment = queries.T @ queries / len(queries)
        got = calibration.of("query_second_moment", 1)[head].numpy()
        np.testing.assert_allclose(got, moment, rtol=1e-4, atol=1e-6)
        keys, values = k[:, head, 0], v[:, head, 0]
        weights = np.array([key @ moment @ key for key in keys])
        expected = (values * (weights / weights.mean())[:, None]).T @ values / len(values)
        got = calibration.of("value_second_moment", 1)[head].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_only_what_is_asked_for_is_gathered(tiny_text_model) -> None:
    model, passes = tiny_text_model().model, []

    class Prompts:
        def __iter__(self) -> Iterator[Any]:
            passes.append(1)
            return iter(prompts())

    found = calibrate_statistics(model, Prompts(), {}, ["key_mean", "output_weight_absmax"])
    assert set(found.statistics) == {"key_mean", "output_weight_absmax"}
    assert len(passes) == 1
    found = calibrate_statistics(model, Prompts(), {}, ["value_second_moment"])
    assert set(found.statistics) == {"query_second_moment", "value_second_moment"}
    assert len(passes) == 3
    with pytest.raises(UserError, match="unknown statistics key_mode"):
        calibrate_statistics(model, Prompts(), {}, ["key_mode"])


@pytest.mark.parametrize("name", ["llama", "multi_head"])
def test_output_weights_are_over_a_groups_column_blocks(tiny_text_model, name: str) -> None:
    model = tiny_text_model(**MODELS[name]).model
    calibration = calibrate_statistics(model, prompts(), {})
    heads, groups = model.config.num_key_value_heads, 4 // model.config.num_key_value_heads
    for layer, block in enumerate(model.model.layers):
        weight = block.self_attn.o_proj.weight.detach().numpy()
        for head in range(heads):
            columns = weight[:, head * groups * 16 : (head + 1) * groups * 16]
            expected = np.abs(columns).max(0).reshape(groups, 16).max(0)
            got = calibration.of("output_weight_absmax", layer)[head].numpy()
            np.testing.assert_allclose(got, expected)


def test_images_calibrate_too(case) -> None:
    given = case("llava")
    both = calibrate_statistics(given.model, [given.inputs], {})
    rows = calibrate_statistics(given.model, [given.row(0), given.row(1)], {})
    for name in ("value_min", "value_max", "key_min", "key_max"):
        torch.testing.assert_close(
            both.statistics[name], rows.statistics[name], atol=1e-4, rtol=1e-4
        )


def test_the_model_is_as_before(tiny_text_model) -> None:
    model = tiny_text_model().model
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        before = model(ids).logits
        calibrate_statistics(model, prompts(), {})
        assert torch.equal(before, model(ids).logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_prompts_is_an_error(tiny_text_model) -> None:
    with pytest.raises(UserError, match="at least one prompt"):
        calibrate_statistics(tiny_text_model().model, [], {})


@pytest.fixture
def calibration() -> Calibration:
    source = torch.Generator().manual_seed(0)
    specs = [LayerSpec(layer, 2, 4, 2, 16) for layer in range(2)]
    shapes = {name: statistic_shape(name, specs) for name in STATISTICS}
    statistics = {name: torch.rand(shape, generator=source) for name, shape in shapes.items()}
    return Calibration(statistics, {"model": "tiny", "revision": "abc", "seed": "7"})


def test_files_bring_everything_back(calibration, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "tiny.safetensors"
    save_calibration(calibration, path)
    loaded = load_calibration(path)
    assert loaded.manifest == calibration.manifest
    assert loaded.statistics.keys() == calibration.statistics.keys()
    for name, tensor in calibration.statistics.items():
        assert torch.equal(loaded.statistics[name], tensor)


def test_damaged_files_are_named(calibration, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_calibration(calibration, path)
    content = path.read_bytes()
    for broken in (
        b"",
        content[:4],
        content[:-10],
        b"not safetensors at all",
        content[:8] + b"{" * 99,
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"tiny\.safetensors"):
            load_calibration(path)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        load_calibration(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=str(tmp_path.name)):
        load_calibration(tmp_path)


@pytest.mark.parametrize("manifest", ["{", "[]", '"text"', "7"])
def test_a_manifest_that_is_not_one_is_named(calibration, tmp_path: Path, manifest: str) -> None:
    path = tmp_path / "tiny.safetensors"
    save_file(dict(calibration.statistics), path, metadata={"manifest": manifest})
    with pytest.raises(UserError, match=r"tiny\.safetensors"):
        load_calibration(path)


def test_statistics_may_not_be_missing(calibration, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    few = {name: t for name, t in calibration.statistics.items() if name != "key_min"}
    save_calibration(Calibration(few), path)
    assert load_calibration(path, ["key_max"]).statistics.keys() == few.keys()
    with pytest.raises(UserError, match=r"lacks key_min; run `kvbench calibrate`"):
        load_calibration(path, ["key_max", "key_min"])


def test_unwritable_places_are_named(calibration, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        save_calibration(calibration, tmp_path / "file" / "tiny.safetensors")
    with pytest.raises(UserError, match="can't be written"):
        save_calibration(calibration, tmp_path)


@pytest.mark.parametrize("method", ["skvq", "smoothquant"])
def test_statistics_of_another_model_are_refused(tiny_text_model, calibration, method: str) -> None:
    with pytest.raises(UserError, match="calibrate this model"):
        quantized_cache(tiny_text_model(layers=3).model, method, calibration=calibration)
    with pytest.raises(UserError, match="calibrate this model"):
        quantized_cache(tiny_text_model(head_dim=64).model, method, calibration=calibration)
    quantized_cache(tiny_text_model().model, method, calibration=calibration)
