"""Statistics of keys, values and queries, collected by running prompts and kept in files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kvbench.cache.argument import cache_argument
from kvbench.cache.attention import StoredStates, attention
from kvbench.cache.contract import Calibration, LayerSpec, Needs
from kvbench.cache.observers import Observed, decoder_stack, observing
from kvbench.cache.specs import layer_specs
from kvbench.cache.statistics import STATISTICS, Seen, finished, passes
from kvbench.cache.watching import WatchingLayer
from kvbench.errors import UserError


class _StatisticsLayer(WatchingLayer):
    """Exact attention over one prompt that gathers statistics of its states."""

    def __init__(self, spec: LayerSpec, observed: Observed) -> None:
        super().__init__(spec, observed)
        self.names: list[str] = []
        self.parts: dict[str, tuple[Tensor, ...]] = {}
        self.statistics: dict[str, Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, step: StoredStates, mask: Tensor | None, **how: Any
    ) -> Tensor:
        seen = self._states(query, step.keys, step.values)
        for name in self.names:
            self.parts[name] = STATISTICS[name].folded(self.parts.get(name), seen)
        out, _ = attention(module, query, step.keys, step.values, mask, **how)
        return out.transpose(1, 2)

    def _states(self, query: Tensor, keys: Tensor, values: Tensor) -> Seen:
        rows, new = query.shape[0], query.shape[2]
        valid = self.observed.valid
        if valid is None:
            valid = torch.ones(rows, new, dtype=torch.bool)
        mask = valid.to(query.device)
        columns = torch.arange(new, device=query.device).expand(rows, -1)

        def flat(x: Tensor) -> Tensor:
            return x.transpose(1, 2)[mask]

        return Seen(
            flat(query).unflatten(1, (self.spec.num_kv_heads, -1)),
            flat(keys),
            flat(values),
            lambda: flat(self.observed.rotary.strip(keys, columns)),
            self.statistics,
        )

    def finish(self) -> None:
        """End a pass."""
        self.statistics |= {name: finished(self.parts.pop(name)) for name in self.names}


class _StatisticsCache(Cache):
    """A cache that only watches."""

    layers: list[_StatisticsLayer]  # type: ignore[assignment]

    def __init__(self, specs: list[LayerSpec]) -> None:
        self.observed = Observed(Needs(), pre_rope=True)
        super().__init__(layers=[_StatisticsLayer(spec, self.observed) for spec in specs])

    def restart(self) -> None:
        """Be ready for the next prompt; what was gathered stays."""
        self.observed.rotary.ids = None
        for layer in self.layers:
            layer.length = 0


@torch.no_grad()
def calibrate_statistics(
    model: PreTrainedModel,
    prompts: Iterable[Mapping[str, Any]],
    manifest: Mapping[str, str],
    names: Collection[str] = tuple(STATISTICS),
) -> Calibration:
    """Run prompts (keyword arguments of the model's forward) and collect statistics.

    Prompts are gone through once, or twice where one statistic builds on another. `names` are those
    of `kvbench.cache.statistics.STATISTICS`.

    Raises:
        UserError: there are no prompts, a statistic is unknown, or the model doesn't cache plain
            keys and values.
    """
    from kvbench.cache.quantized import use_kvbench_attention

    if unknown := set(names) - set(STATISTICS):
        raise UserError(f"unknown statistics {', '.join(sorted(unknown))}; use {[*STATISTICS]}.")
    specs = layer_specs(model.config)
    use_kvbench_attention(model)
    cache, count = _StatisticsCache(specs), 0
    if isinstance(prompts, Iterator):
        prompts = list(prompts)  # an iterator could be gone through only once
    with observing(model):
        for gathered in passes(set(names)):
            count = _run(model, cache, prompts, _read_weights(model, cache, gathered))
    if not count:
        raise UserError("calibration needs at least one prompt.")
    statistics = {
        name: torch.stack([layer.statistics[name].cpu() for layer in cache.layers])
        for name in cache.layers[0].statistics
    }
    return Calibration(statistics, {**manifest, "prompts": str(count)})


def _read_weights(model: nn.Module, cache: _StatisticsCache, names: list[str]) -> list[str]:
    """Gather what stands in weights; the names that need prompts are left."""
    for name in names:
        if (read := STATISTICS[name].weights) is not None:
            modules = (block.self_attn for block in decoder_stack(model).layers)
            for layer, module in zip(cache.layers, modules, strict=True):
                layer.statistics[name] = read(module, layer.spec)
    return [name for name in names if STATISTICS[name].weights is None]


def _run(
    model: PreTrainedModel,
    cache: _StatisticsCache,
    prompts: Iterable[Mapping[str, Any]],
    names: list[str],
) -> int:
    """One pass over the prompts; how many there were."""
    count = 0
    for layer in cache.layers:
        layer.names = names
    given = cache_argument(model, cache)
    for prompt in prompts:
        count += 1
        cache.restart()
        model(**prompt, **given, use_cache=True, logits_to_keep=1)
    for layer in cache.layers if count else ():
        layer.finish()
    return count


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write safetensors with the manifest in its header.

    Raises:
        UserError: the file can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in calibration.statistics.items()}
        save_file(tensors, path, metadata={"manifest": json.dumps(dict(calibration.manifest))})
    except (OSError, SafetensorError) as error:
        raise UserError(f"calibration can't be written to {path}: {error}.") from error


def load_calibration(path: Path, needed: Collection[str] = ()) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        UserError: the file is missing, damaged, or lacks a needed statistic.
    """
    try:
        with safe_open(path, "pt") as file:
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"no calibration can be read from {path}: {error}.") from error
    if not isinstance(manifest, dict):
        raise UserError(f"no calibration can be read from {path}: its manifest is no JSON object.")
    if missing := set(needed) - set(statistics):
        raise UserError(
            f"the calibration in {path} lacks {', '.join(sorted(missing))}; run `kvbench "
            "calibrate` again and name every method that will use the file in --methods."
        )
    return Calibration(statistics, manifest)
