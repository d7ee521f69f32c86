"""Per-channel statistics of keys, values and queries, collected by running prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvbench.cache.attention import StoredStates, attention
from kvbench.cache.contract import Calibration, LayerSpec, Needs
from kvbench.cache.observers import Observed, decoder_stack, observing
from kvbench.cache.specs import layer_specs
from kvbench.errors import UserError

STATISTICS = {
    "query_absmax": "(layers, H, D) largest |q| after RoPE, over the query heads of each key head",
    "key_absmax": "(layers, H, D) largest |k| after RoPE",
    "value_absmax": "(layers, H, D) largest |v|",
    "output_weight_absmax": "(layers, H, D) largest |W_O| a value channel meets",
    "key_min": "(layers, H, D) smallest k before RoPE",
    "key_max": "(layers, H, D) largest k before RoPE",
    "value_min": "(layers, H, D) smallest v",
    "value_max": "(layers, H, D) largest v",
}


class _StatisticsLayer(CacheLayerMixin):
    """Exact attention over one prompt that remembers extremes of every channel."""

    is_sliding = False

    def __init__(self, spec: LayerSpec, observed: Observed) -> None:
        super().__init__()
        self.spec, self.observed, self._seen = spec, observed, 0
        self.extremes: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StoredStates, StoredStates]:
        step = StoredStates(self, key_states, value_states)  # type: ignore[arg-type]
        self._seen += key_states.shape[2]
        return step, step

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        step: StoredStates,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        heads = self.spec.num_kv_heads
        valid = self.observed.valid
        if valid is None:
            valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
        columns = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
        before = self.observed.rotary.strip(step.keys, columns)
        grouped = query.unflatten(1, (heads, -1)).abs().amax(2)
        self._note(valid, "query_absmax", grouped, torch.maximum)
        self._note(valid, "key_absmax", step.keys.abs(), torch.maximum)
        self._note(valid, "value_absmax", step.values.abs(), torch.maximum)
        self._note(valid, "key_min", before, torch.minimum)
        self._note(valid, "key_max", before, torch.maximum)
        self._note(valid, "value_min", step.values, torch.minimum)
        self._note(valid, "value_max", step.values, torch.maximum)
        out, _ = attention(module, query, step.keys, step.values, mask, **options)
        return out.transpose(1, 2)

    def _note(
        self, valid: Tensor, name: str, x: Tensor, better: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Fold (B, H, n, D) into the running (H, D) extreme."""
        real = x.float().transpose(1, 2)[valid.to(x.device)]
        extreme = real.amax(0) if better is torch.maximum else real.amin(0)
        old = self.extremes.get(name)
        self.extremes[name] = extreme if old is None else better(old, extreme)

    def restart(self) -> None:
        """Be ready for the next prompt; extremes stay."""
        self._seen = 0

    def get_seq_length(self) -> int:
        return self._seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen + query_length, 0


class _StatisticsCache(Cache):
    """A cache that only watches."""

    layers: list[_StatisticsLayer]  # type: ignore[assignment]

    def __init__(self, specs: list[LayerSpec]) -> None:
        self.observed = Observed(Needs(), pre_rope=True)
        super().__init__(layers=[_StatisticsLayer(spec, self.observed) for spec in specs])

    def restart(self) -> None:
        self.observed.rotary.ids = None
        for layer in self.layers:
            layer.restart()


@torch.no_grad()
def calibrate_statistics(
    model: PreTrainedModel, prompts: Iterable[Mapping[str, Any]], manifest: Mapping[str, str]
) -> Calibration:
    """Run prompts (keyword arguments of the model's forward) and collect every statistic.

    Raises:
        UserError: there are no prompts, or the model doesn't cache plain keys and values.
    """
    from kvbench.cache.quantized import use_kvbench_attention

    specs = layer_specs(model.config)
    use_kvbench_attention(model)
    cache = _StatisticsCache(specs)
    count = 0
    with observing(model):
        for prompt in prompts:
            count += 1
            cache.restart()
            model(**prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if not count:
        raise UserError("calibration needs at least one prompt.")
    statistics = {
        name: torch.stack([layer.extremes[name].cpu() for layer in cache.layers])
        for name in STATISTICS
        if name != "output_weight_absmax"
    }
    statistics["output_weight_absmax"] = _output_weights(model, specs)
    return Calibration(statistics, {**manifest, "prompts": str(count)})


def _output_weights(model: nn.Module, specs: list[LayerSpec]) -> Tensor:
    """(layers, H, D): largest |W_O| over rows and over the query heads that share a value head."""
    rows = []
    for layer, spec in zip(decoder_stack(model).layers, specs, strict=True):
        with align_module_device(layer.self_attn.o_proj):  # the weight may be in main memory
            weight = layer.self_attn.o_proj.weight.detach().float().abs().amax(0)
        rows.append(weight.view(spec.num_kv_heads, -1, spec.head_dim).amax(1).cpu())
    return torch.stack(rows)


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


def load_calibration(path: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises:
        UserError: the file is missing, damaged, or lacks a statistic.
    """
    try:
        with safe_open(path, "pt") as file:
            statistics = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            manifest = json.loads((file.metadata() or {}).get("manifest", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"no calibration can be read from {path}: {error}.") from error
    if not isinstance(manifest, dict):
        raise UserError(f"no calibration can be read from {path}: its manifest is no JSON object.")
    if missing := set(STATISTICS) - set(statistics):
        raise UserError(f"the calibration in {path} lacks {', '.join(sorted(missing))}.")
    return Calibration(statistics, manifest)
