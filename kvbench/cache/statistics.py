"""What can be calibrated: statistics of a layer's states, folded over the tokens of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from kvbench.cache.contract import LayerSpec
from kvbench.errors import UserError


@dataclass(frozen=True)
class Seen:
    """States of one prompt's tokens in one layer, padding left out."""

    query: Tensor
    """(n, H, Hq / H, D) after RoPE, by the key head that query heads share."""
    key: Tensor
    """(n, H, D) after RoPE."""
    value: Tensor
    """(n, H, D)."""
    strip: Callable[[], Tensor]
    earlier: Mapping[str, Tensor]
    """This layer's statistics of the pass before."""

    @cached_property
    def bare_key(self) -> Tensor:
        """(n, H, D) before RoPE."""
        return self.strip()


@dataclass(frozen=True)
class Statistic:
    """One statistic of a layer: what a prompt gives, and how prompts are folded together.

    `of` gives one tensor, or a sum and its weight, to be divided when all prompts are in; `weights`
    reads the attention module instead. A statistic with `after` needs another pass over the
    prompts, in which it sees that statistic finished.
    """

    text: str
    shape: Callable[[LayerSpec], tuple[int, ...]]
    of: Callable[[Seen], tuple[Tensor, ...]] | None = None
    fold: Callable[[Tensor, Tensor], Tensor] = torch.add
    weights: Callable[[nn.Module, LayerSpec], Tensor] | None = None
    after: str | None = None

    def folded(self, old: tuple[Tensor, ...] | None, seen: Seen) -> tuple[Tensor, ...]:
        """What was gathered before with one more prompt."""
        new = () if self.of is None else self.of(seen)
        return new if old is None else tuple(map(self.fold, old, new))


def finished(parts: tuple[Tensor, ...]) -> Tensor:
    """An extreme as it is, a sum over its weight; float32."""
    total, *weight = parts
    return (total / weight[0].clamp_min(1e-12) if weight else total).float()


def _vector(spec: LayerSpec) -> tuple[int, ...]:
    return spec.num_kv_heads, spec.head_dim


def _matrix(spec: LayerSpec) -> tuple[int, ...]:
    return spec.num_kv_heads, spec.head_dim, spec.head_dim


def _largest(text: str, states: Callable[[Seen], Tensor]) -> Statistic:
    return Statistic(text, _vector, lambda seen: (states(seen).float().amax(0),), torch.maximum)


def _smallest(text: str, states: Callable[[Seen], Tensor]) -> Statistic:
    return Statistic(text, _vector, lambda seen: (states(seen).float().amin(0),), torch.minimum)


def _key_sum(seen: Seen) -> tuple[Tensor, Tensor]:
    total = seen.bare_key.double().sum(0)
    return total, torch.full_like(total, len(seen.key))


def _query_moment(seen: Seen) -> tuple[Tensor, Tensor]:
    query = seen.query.double()
    total = torch.einsum("nhgd,nhge->hde", query, query)
    return total, torch.full_like(total, query.shape[0] * query.shape[2])


def _value_moment(seen: Seen) -> tuple[Tensor, Tensor]:
    """OSCAR's code: a token's weight is kᵀ M k with the queries' second moment M of its head."""
    key, value = seen.key.double(), seen.value.double()
    moment = seen.earlier["query_second_moment"].to(key)
    weight = torch.einsum("nhd,hde,nhe->nh", key, moment, key)
    total = torch.einsum("nh,nhd,nhe->hde", weight, value, value)
    return total, weight.sum(0)[:, None, None].expand_as(total)


def _output_weight(module: nn.Module, spec: LayerSpec) -> Tensor:
    attention: Any = module
    with align_module_device(attention.o_proj):  # the weight may be in main memory
        weight = attention.o_proj.weight.detach().float().abs().amax(0)
    return weight.view(spec.num_kv_heads, -1, spec.head_dim).amax(1)


STATISTICS: dict[str, Statistic] = {
    "query_absmax": _largest(
        "(layers, H, D) largest |q| after RoPE, over the query heads of each key head",
        lambda seen: seen.query.abs().amax(2),
    ),
    "key_absmax": _largest("(layers, H, D) largest |k| after RoPE", lambda seen: seen.key.abs()),
    "value_absmax": _largest("(layers, H, D) largest |v|", lambda seen: seen.value.abs()),
    "output_weight_absmax": Statistic(
        "(layers, H, D) largest |W_O| a value channel meets", _vector, weights=_output_weight
    ),
    "key_min": _smallest("(layers, H, D) smallest k before RoPE", lambda seen: seen.bare_key),
    "key_max": _largest("(layers, H, D) largest k before RoPE", lambda seen: seen.bare_key),
    "value_min": _smallest("(layers, H, D) smallest v", lambda seen: seen.value),
    "value_max": _largest("(layers, H, D) largest v", lambda seen: seen.value),
    "key_mean": Statistic("(layers, H, D) mean k before RoPE", _vector, _key_sum),
    "query_second_moment": Statistic(
        "(layers, H, D, D) mean of q qᵀ after RoPE, over the query heads of each key head",
        _matrix,
        _query_moment,
    ),
    "value_second_moment": Statistic(
        "(layers, H, D, D) mean of v vᵀ, each token weighted with kᵀ M k where M is the head's "
        "query_second_moment",
        _matrix,
        _value_moment,
        after="query_second_moment",
    ),
}


def passes(names: set[str]) -> list[list[str]]:
    """Statistics to gather in each pass over the prompts, those that others build on added."""
    asked = names | {s.after for n in names if (s := STATISTICS[n]).after is not None}
    first = [name for name in STATISTICS if name in asked and STATISTICS[name].after is None]
    second = [name for name in STATISTICS if name in asked and STATISTICS[name].after is not None]
    return [first, second] if second else [first]


def statistic_shape(name: str, specs: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Shape of a statistic of a whole model; all layers are alike.

    Raises:
        UserError: there is no such statistic.
    """
    if name not in STATISTICS:
        raise UserError(f"unknown statistic {name!r}; known are {', '.join(STATISTICS)}.")
    return len(specs), *STATISTICS[name].shape(specs[0])
