"""Models whose layers are on several devices: the same answers, each layer's cache at its layer.

Where there are no two devices, tensors say that they are on some and refuse to meet others.

A `Placed` tensor holds a real CPU tensor and claims a device that does not exist. As on GPUs,
operations on tensors of two devices fail, but for copies, single numbers on the host, and indices
on the host. Works for code that makes tensors on a device as for code that moves them there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kvbench.cache import Calibration, KVQuantizer, QuantizedCache, bind, calibrate_statistics
from kvbench.evaluation.decode import Answers, Generation, answer
from kvbench.models import AUTO_MAP
from kvbench.models.find import find_model
from kvbench.models.inputs import ModelInputs, batch, encode
from kvbench.models.load import LoadedModel, load_model
from kvbench.registry import METHODS, configured, parse_spec

FIRST, SECOND = torch.device("meta:0"), torch.device("meta:1")
"""torch knows of meta devices but gives their tensors no content: nobody else uses these two."""
_HOST = torch.device("cpu")
_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._unsafe_index.Tensor,
}


class Placed(Tensor):
    """A CPU tensor that claims another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), **layout, dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Placed({self.held!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do it on the CPU; what comes out is where the operation says, else where its tensors are."""
    if func == _aten.copy_.default:
        _held(args[0]).copy_(_held(args[1]))
        return args[0]
    asked = kwargs.get("device")
    target = _where(func, args, kwargs) if asked is None else torch.device(asked)
    if asked is not None:
        kwargs = {**kwargs, "device": _HOST}
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func._schema.is_mutable:  # in place: the same tensor comes back
        return args[0] if isinstance(out, Tensor) else out
    return tree_map(lambda x: _placed(x, target), out)


def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    given = args[:1] if func in _COPIES | _INDEXING else (args, kwargs)
    tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
    places = {x.device for x in tensors if x.dim() or x.device != _HOST}
    if len(places) > 1:
        raise RuntimeError(f"{func}: tensors on {' and '.join(sorted(map(str, places)))}")
    return places.pop() if places else _HOST


def _held(x: Any) -> Any:
    if isinstance(x, Tensor) and not isinstance(x, Placed) and x.is_meta:
        raise RuntimeError("a tensor without content: it was made behind the back of these modes")
    return x.held if isinstance(x, Placed) else x


def _placed(x: Any, device: torch.device) -> Any:
    plain = isinstance(x, Tensor) and not isinstance(x, Placed) and device != _HOST
    return Placed(x, device) if plain else x


def _index(index: Any) -> Any:
    """Lists in an index as tensors: torch would make them on the device."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


class _Factories(TorchDispatchMode):
    """Operations that make tensors on a fake device, or bring them there from the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, Placed) for x in tree_leaves((args, kwargs))):
            return _run(func, args, kwargs)
        if kwargs.get("device") is None or torch.device(kwargs["device"]) not in (FIRST, SECOND):
            return func(*args, **kwargs)
        return _run(func, args, kwargs)


class _Numbers(TorchFunctionMode):
    """Numbers to and from the host, which go by no operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return _placed(torch.tensor(*args, **kwargs), device)
        if func is Tensor.new_tensor and isinstance(args[0], Placed):
            return _placed(args[0].held.new_tensor(*args[1:], **kwargs), args[0].device)
        if func is Tensor.tolist:
            return _held(args[0]).tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        return func(*args, **kwargs)


@contextmanager
def spread(model: nn.Module, places: Mapping[str, torch.device]) -> Iterator[None]:
    """Lay modules, by name, on fake devices, with accelerate's own hooks between them."""
    saved = [
        (store, name, tensor)
        for module in model.modules()
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    with ExitStack() as stack:
        for mode in (torch.no_grad(), _Factories(), _Numbers()):
            stack.enter_context(mode)
        try:
            for path, device in places.items():
                for module in model.get_submodule(path).modules():
                    for store in (module._parameters, module._buffers):
                        for name, tensor in store.items():
                            if tensor is not None:
                                store[name] = Placed(tensor.detach(), device)  # type: ignore[assignment]
            devices = {"": FIRST, **places}  # as accelerate.dispatch_model lays them out
            attach_align_device_hook_on_blocks(model, devices, dict.fromkeys(places, False))
            yield
        finally:
            remove_hook_from_module(model, recurse=True)
            for store, name, tensor in saved:
                store[name] = tensor


SMALL = {  # windows and groups that these prompts fill several times
    "rtn_int2_wht_tsa": "rtn_int2_wht_tsa[recent=8]",
    "smoothquant": "smoothquant[group_size=8]",
    "kivi": "kivi[residual=16,group_size=8]",
    "skvq": "skvq[window=8,sinks=2,group_size=8]",
    "akvq_vl": "akvq_vl[recent=8,pivots=2]",
}
OURS = [name for name in METHODS.names() if isinstance(METHODS.get(name), KVQuantizer)]
CASES = [(name, "quantized_prefill") for name in OURS]
CASES += [(name, "exact_prefill") for name in ("akvq_vl", "skvq")]
TEXTS = ("What has changed between the two pictures?", "And here?")


def places(loaded: LoadedModel) -> dict[str, torch.device]:
    """The vision tower and the first of three layers on one device, the rest on the other."""
    stack = loaded.model.model.language_model
    prefix = next(name for name, module in loaded.model.named_modules() if module is stack)
    inside = {f"{prefix}.embed_tokens": FIRST, f"{prefix}.rotary_emb": FIRST}
    inside |= {f"{prefix}.layers.{i}": SECOND if i else FIRST for i in range(len(stack.layers))}
    inside[f"{prefix}.norm"] = inside["lm_head"] = SECOND
    beside = [name for name, _ in loaded.model.model.named_children() if name != "language_model"]
    return {**{f"model.{name}": FIRST for name in beside}, **inside}


def prompts(loaded: LoadedModel) -> ModelInputs:
    """Two of different length."""
    return batch([encode(loaded, text, [], where="here") for text in TEXTS], loaded.pad_id)


def answers(
    loaded: LoadedModel, spec: str, protocol: Any, calibration: Calibration
) -> tuple[Answers, QuantizedCache]:
    method = configured(METHODS.get(parse_spec(spec)[0]), parse_spec(spec)[1])
    bound = bind(loaded.model, method, protocol=protocol, calibration=calibration)
    exact = bind(loaded.model, "fp16", protocol=protocol).new_cache()
    inputs, generation = prompts(loaded), Generation(5)
    references = answer(loaded.model, inputs, exact, generation).rows
    cache = bound.new_cache()
    return answer(loaded.model, inputs, cache, generation, references), cache


def calibrate(loaded: LoadedModel) -> Calibration:
    inputs = prompts(loaded)
    return calibrate_statistics(loaded.model, [inputs.kwargs()], {})


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def plain(request: pytest.FixtureRequest) -> LoadedModel:
    """A tiny model in float64, where sums in another order can't tip a code over."""
    folder: Path = request.getfixturevalue(f"tiny_{request.param}_folder")
    return load_model(find_model(f"tiny={folder}"), dtype=torch.float64)


@pytest.fixture(scope="module")
def calibration(plain: LoadedModel) -> Calibration:
    return calibrate(plain)


def tensors(part: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in an object of the cache, however deep."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from tensors(item, seen)
    elif isinstance(part, dict):
        for item in part.values():
            yield from tensors(item, seen)
    elif type(part).__module__.startswith("kvbench."):
        yield from tensors(vars(part), seen)


def stored(layer: Any) -> list[Tensor]:
    return [*tensors(layer.key_store, set()), *tensors(layer.value_store, set())]


def test_fake_devices_refuse_to_meet() -> None:
    with spread(nn.Linear(2, 2), {}):
        one, two = torch.ones(3, device=FIRST), torch.arange(3, device=SECOND)
        assert (one + 1).device == one[1:].device == (one * torch.tensor(2.0)).device == FIRST
        assert (one.to(SECOND) + two).cpu().tolist() == [1, 2, 3]
        assert one[torch.tensor([0, 2])].sum().item() == 2
        for host in (two, torch.arange(3)):
            with pytest.raises(RuntimeError, match="tensors on"):
                one + host
        with pytest.raises(RuntimeError, match="tensors on meta:0 and meta:1"):
            torch.cat((one, two))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "protocol"), CASES)
def test_layers_on_two_devices(
    plain: LoadedModel, calibration: Calibration, name: str, protocol: str
) -> None:
    if plain.entry.family == "qwen2_vl" and name not in ("akvq_vl", "skvq"):
        pytest.skip("differs from LLaVA by its positions only")
    spec = SMALL.get(name, name)
    expected, _ = answers(plain, spec, protocol, calibration)
    with spread(plain.model, places(plain)):
        assert plain.device == FIRST
        found, cache = answers(plain, spec, protocol, calibration)
        for index, layer in enumerate(cache.layers):
            devices = {x.device for x in stored(layer) if x.dtype != torch.int8 or x.is_meta}
            assert devices - {_HOST} == {SECOND if index else FIRST}
    assert [row.ids for row in found.rows] == [row.ids for row in expected.rows]
    assert [row.usage for row in found.rows] == [row.usage for row in expected.rows]
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert one.divergences == pytest.approx(other.divergences, abs=1e-9)


class Recorded(dict[int, Tensor]):
    """Remembers where what was put into it was."""

    def __init__(self) -> None:
        self.devices: dict[int, torch.device] = {}

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.devices[index] = value.device
        super().__setitem__(index, value)


def test_residual_streams_follow_their_layers(plain: LoadedModel) -> None:
    with spread(plain.model, places(plain)):
        cache = bind(plain.model, "akvq_vl[pivot_layers=all]").new_cache()
        cache.observed.residual = recorded = Recorded()
        answer(plain.model, prompts(plain), cache, Generation(1))
    assert recorded.devices == {0: FIRST, 1: SECOND, 2: SECOND}


def test_statistics_of_layers_on_two_devices(plain: LoadedModel, calibration: Calibration) -> None:
    with spread(plain.model, places(plain)):
        found = calibrate(plain)
    for name, statistic in calibration.statistics.items():
        assert type(found.statistics[name]) is Tensor
        torch.testing.assert_close(found.statistics[name], statistic)


def test_weights_in_main_memory(plain: LoadedModel, calibration: Calibration) -> None:
    """Between forward calls they have no content where the model computes."""
    spec = SMALL["akvq_vl"]
    expected, _ = answers(plain, spec, "quantized_prefill", calibration)
    state = {name: tensor.clone() for name, tensor in plain.model.state_dict().items()}
    cpu_offload(plain.model, torch.device("cpu"), state_dict=state)
    try:
        assert plain.model.device.type == "meta" and plain.device.type == "cpu"
        found, _ = answers(plain, spec, "quantized_prefill", calibration)
        statistics = calibrate(plain).statistics
    finally:
        remove_hook_from_module(plain.model, recurse=True)
    assert [row.ids for row in found.rows] == [row.ids for row in expected.rows]
    for name, statistic in calibration.statistics.items():
        torch.testing.assert_close(statistics[name], statistic)


def test_auto_map_where_all_fits(tiny_llava_folder: Path) -> None:
    entry = find_model(f"tiny={tiny_llava_folder}")
    one, spread = load_model(entry), load_model(entry, AUTO_MAP)
    if not torch.cuda.is_available():
        assert spread.device == torch.device("cpu")
    assert one.revision == spread.revision
    for mine, other in zip(one.model.parameters(), spread.model.parameters(), strict=True):
        assert torch.equal(mine, other.cpu())
