"""The capacity model against formulas written out here, and against tensors counted alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedModel, Qwen2VLConfig

from kvbench.cache import bind
from kvbench.efficiency.capacity import Capacity, capacity, prompt_nbytes
from kvbench.efficiency.plan import model_capacity, modelled_row, plan_line, plan_table, step_bound
from kvbench.efficiency.profiles import PROFILES
from kvbench.efficiency.shapes import empty_model, model_shape
from kvbench.efficiency.workload import Workload
from kvbench.errors import UserError
from kvbench.registry import MODELS
from tests.efficiency.made_up import SETTING

GIB = 1 << 30
PAPER = Workload(600, 576, 512)
LAYERS, HEADS, HEAD_DIM = 32, 32, 128
ELEMENTS = 2 * LAYERS * HEADS * HEAD_DIM  # numbers a token, keys and values


class Alive(TorchDispatchMode):
    """Counts bytes of tensors made inside it that are alive together."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: item for key, item in self._alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def llava7b(method: str) -> Capacity:
    return model_capacity(MODELS.get("llava15_7b"), method)


def decoder(**changes: int) -> LlamaConfig:
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1408}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaConfig(**(sizes | changes))


def test_bytes_of_llava_7b() -> None:
    shape = llava7b("fp16").shape
    hidden, inner, vocabulary = 4096, 11008, 32064
    layer = 4 * hidden**2 + 3 * hidden * inner
    matrices = LAYERS * layer + hidden * vocabulary
    norms = (2 * LAYERS + 1) * hidden
    # RoPE keeps 64 float32 inverse frequencies, twice.
    assert shape.linear_parameters == matrices
    assert shape.language_bytes == 2 * (matrices + hidden * vocabulary + norms) + 2 * 64 * 4
    width, mlp = 1024, 4096
    block = 4 * width * (width + 1) + 2 * width * mlp + mlp + width + 4 * width
    tower = 24 * block + 577 * width + 3 * 14 * 14 * width + width + 4 * width
    projector = width * hidden + hidden + hidden * hidden + hidden
    assert shape.vision_bytes == 2 * (tower + projector) + 577 * 8


def test_tied_embeddings_count_once() -> None:
    config = decoder()
    config.tie_word_embeddings = True
    loose, tied = (model_shape(empty_model(c)) for c in (decoder(), config))
    assert loose.language_bytes - tied.language_bytes == 2 * 64 * 512
    assert loose.linear_parameters == tied.linear_parameters


def test_fp16_cache_to_the_byte() -> None:
    tokens = 600 + 512 - 1  # the last answer token is never fed back
    assert llava7b("fp16").footprint(PAPER).cache == tokens * ELEMENTS * 2
    forty = llava7b("fp16").footprint(replace(PAPER, batch=40))
    assert forty.cache == 40 * tokens * ELEMENTS * 2


def test_two_bits_in_groups_of_128_are_two_and_a_quarter() -> None:
    cache = llava7b("rtn_int2[group_size=128]").footprint(PAPER).cache
    room = 1120  # 1,111 tokens, in blocks of 16
    assert cache == room * ELEMENTS * 2.25 / 8


def test_plain_generate_is_close_to_what_an_h100_took() -> None:
    """576 + 128 tokens: 27 and 41 GiB with DynamicCache, 18 and 23 with quanto's 2 bits."""
    peaks = {("hf_dynamic", 40): 27, ("hf_dynamic", 80): 41}
    peaks |= {("hf_quanto_int2", 40): 18, ("hf_quanto_int2", 80): 23}
    for (method, batch), gib in peaks.items():
        found = llava7b(method).footprint(Workload(577, 576, 128, batch)).allocated / GIB
        assert found == pytest.approx(gib, rel=0.05), method


@pytest.mark.parametrize("method", ["fp16", "akvq_vl", "kivi", "skvq", "hf_dynamic"])
def test_more_rows_and_tokens_never_take_less(method: str) -> None:
    model = llava7b(method)

    def total(length: int, answer: int, batch: int) -> int:
        return model.footprint(Workload(length, 0, answer, batch)).total

    batches = [total(300, 64, batch) for batch in (1, 2, 7, 8, 9, 100)]
    lengths = [total(length, 64, 4) for length in (32, 128, 129, 600, 4000)]
    answers = [total(300, answer, 4) for answer in (1, 2, 64, 128, 129, 512)]
    for series in (batches, lengths):
        assert all(more > less for less, more in pairwise(series))
    # With answers longer than the window, no prompt token can be in it: room for a few less.
    assert all(more > 0.999 * less for less, more in pairwise(answers))
    assert answers[-1] > answers[0]


@pytest.mark.parametrize("method", ["fp16", "akvq_vl", "hf_quanto_int2"])
@pytest.mark.parametrize("limit", [24 * GIB, 64 * GIB, 80 * GIB])
def test_the_largest_batch_is_the_largest_that_fits(method: str, limit: int) -> None:
    model = llava7b(method)
    largest = model.largest_batch(PAPER, limit)
    assert model.footprint(replace(PAPER, batch=largest)).total <= limit
    assert model.footprint(replace(PAPER, batch=largest + 1)).total > limit
    assert model.largest_batch(PAPER, 14 * 10**9) == 0, "the weights alone are more"


def test_the_split_adds_up() -> None:
    found = llava7b("akvq_vl").footprint(replace(PAPER, batch=10))
    parts = (found.weights, found.vision, found.activations, found.cache, found.workspace)
    assert found.allocated == sum(parts)
    assert found.total == found.allocated + found.context


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("inner", [1408, 1792])
def test_activations_of_a_prompt_as_they_live(kv_heads: int, inner: int) -> None:
    config = decoder(num_key_value_heads=kv_heads, intermediate_size=inner)
    model = _real(config)
    ids = torch.randint(64, (2, 300))
    cache = bind(model, "fp16", protocol="exact_prefill").new_cache()
    alive = _alive(model, input_ids=ids, past_key_values=cache)
    expected = prompt_nbytes(model_shape(model), Workload(300, 0, 1))
    assert (alive - cache.nbytes()) / 2 == pytest.approx(expected, rel=0.05)


def test_activations_of_vision_towers_as_they_live() -> None:
    clip = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        image_size=224, patch_size=14, projection_dim=32,
    )  # fmt: skip
    small: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    small |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = _real(LlavaConfig(vision_config=clip, text_config=small, image_token_index=4))
    ids = _with_images(2, 300, 256)
    pixels = torch.randn(2, 3, 224, 224).half()
    alive = _alive(model, input_ids=ids, pixel_values=pixels)
    expected = prompt_nbytes(model_shape(model), Workload(300, 256, 1))
    assert (alive + pixels.nbytes) / 2 == pytest.approx(expected, rel=0.05)

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        vision_config=vision, text_config=small | {"rope_parameters": rope}, image_token_id=4,
        video_token_id=5, vision_start_token_id=6, vision_end_token_id=7,
    )  # fmt: skip
    model, ids = _real(config), _with_images(2, 300, 256)
    pixels = torch.randn(2 * 32 * 32, 3 * 2 * 14 * 14).half()
    grid = torch.tensor([[1, 32, 32]] * 2)
    kinds = (ids == 4).int()
    alive = _alive(
        model, input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds
    )
    expected = prompt_nbytes(model_shape(model), Workload(300, 256, 1))
    assert (alive + pixels.nbytes) / 2 == pytest.approx(expected, rel=0.05)


def test_what_runs_all_prompts_at_once_pays_for_all() -> None:
    assert not llava7b("akvq_vl").together
    assert llava7b("skvq").together, "heads stored together have no kernel"
    ahead = Workload(4000, 3456, 1, 16)
    eight, sixteen = (llava7b("fp16").footprint(ahead, rows).activations for rows in (8, 16))
    assert sixteen == 2 * eight
    assert llava7b("skvq").footprint(ahead, 1) == llava7b("skvq").footprint(ahead, 8)


def test_names_that_nothing_is_known_of() -> None:
    with pytest.raises(UserError, match="unknown model 'llava_7b'"):
        MODELS.get("llava_7b")
    nobody = replace(MODELS.get("llava15_7b"), name="mine")
    with pytest.raises(UserError, match="shapes of mine are not known"):
        model_capacity(nobody, "fp16")
    with pytest.raises(UserError, match="unknown method"):
        llava7b("int5")
    with pytest.raises(UserError, match="can't build a nonsense model"):
        empty_model(type("Config", (), {"model_type": "nonsense"})())


def test_any_model_of_transformers_will_do() -> None:
    model = capacity(empty_model(decoder()), "akvq_vl")
    assert model.shape.vision_bytes == 0
    assert model.largest_batch(Workload(100, 0, 10), 2 * GIB) > 1000


def test_a_plan_has_every_combination() -> None:
    entries = [MODELS.get(name) for name in ("llava15_7b", "llava16_mistral")]
    cards = [PROFILES["v100"], PROFILES["rtx4090"]]
    lines = [
        plan_line(entry.name, method, model_capacity(entry, method), workload, 8, (1, 40), cards)
        for entry in entries
        for method in ("fp16", "akvq_vl")
        for workload in (PAPER, Workload(4000, 3456, 512))
    ]
    assert len(lines) == 2 * 2 * 2
    first = lines[0]
    assert first.peaks[40] == llava7b("fp16").footprint(replace(PAPER, batch=40))
    assert first.largest["v100"] == llava7b("fp16").largest_batch(PAPER, 64 * GIB)
    table = plan_table(lines).splitlines()
    assert len(table) == 2 + len(lines)
    assert table[0].split("  ")[-1] == "Rows on rtx4090"
    assert table[2].split()[-2:] == [str(first.largest["v100"]), str(first.largest["rtx4090"])]


def test_a_step_can_not_be_faster_than_its_bytes_and_products() -> None:
    card = PROFILES["h100"]
    assert card.bandwidth is not None and card.fp16_rate is not None
    matrices = 2 * (LAYERS * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32064)
    middle = 600 + 256
    one = step_bound(llava7b("fp16"), PAPER, card)
    assert one == pytest.approx((matrices + middle * ELEMENTS * 2) / card.bandwidth)
    many = replace(PAPER, batch=1000)
    products = 1000 * matrices / card.fp16_rate
    read = 1000 * middle * ELEMENTS * 2 / card.bandwidth
    assert step_bound(llava7b("fp16"), many, card) == pytest.approx(products + read)
    assert step_bound(llava7b("fp16"), PAPER, replace(card, fp16_rate=None)) is None


SHAPES = replace(SETTING, revision="shapes", memory="modelled", device="", code="", versions={})
ROW = {"machine": "CPU", "command": "kvbench efficiency", "time": "2026-01-01T00:00:00+00:00"}


def test_a_modelled_row_says_what_it_is() -> None:
    row = modelled_row(SHAPES, llava7b("fp16"), PROFILES["v100"], **ROW)
    assert row.batch == llava7b("fp16").largest_batch(PAPER, 64 * GIB)
    assert row.out_of_memory_at == row.batch + 1
    assert (row.memory, row.path, row.tries) == ("modelled", "bound", 0)
    assert "lower bounds" in row.detail
    assert row.over_floor is None and row.achieved_bandwidth is None, "nothing was measured"
    full = replace(PAPER, batch=row.batch)
    assert row.peak_nvml == llava7b("fp16").footprint(full).total
    assert row.tpot_median_s == step_bound(llava7b("fp16"), full, PROFILES["v100"])


def test_a_modelled_batch_that_does_not_fit() -> None:
    asked = replace(SHAPES, fixed_batch=500)
    row = modelled_row(asked, llava7b("fp16"), PROFILES["v100"], **ROW)
    assert (row.status, row.batch) == ("oom", 0)
    assert "500 rows need" in row.detail
    assert row.peak_nvml is None and row.throughput is None
    fits = modelled_row(replace(SHAPES, fixed_batch=40), llava7b("fp16"), PROFILES["v100"], **ROW)
    assert (fits.status, fits.batch, fits.out_of_memory_at) == ("ok", 40, None)


def _real(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        model: PreTrainedModel = _auto(config)(config, dtype=torch.float16)
    return model.eval()


def _auto(config: Any) -> Callable[..., Any]:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    return kind.from_config


def _alive(model: PreTrainedModel, **inputs: Any) -> int:
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    known = [*model.parameters(), *model.buffers(), *tensors]
    with torch.no_grad(), Alive(known) as alive:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return alive.peak


def _with_images(rows: int, length: int, vision: int) -> torch.Tensor:
    ids = torch.randint(10, 60, (rows, length))
    ids[:, 5 : 5 + vision] = 4
    return ids
