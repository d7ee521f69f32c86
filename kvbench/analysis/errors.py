"""How far a method's stored keys, values and attention are from the exact ones in one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvbench.analysis.capture import LayerView
from kvbench.cache import BoundMethod, Transform
from kvbench.cache.layer import QuantizedLayer
from kvbench.cache.observers import Observed
from kvbench.errors import UserError


@dataclass(frozen=True)
class LayerError:
    """Relative errors, ‖stored - exact‖ / ‖exact‖ over the whole prompt.

    Attributes:
        key: Of the keys, as attention reads them, in the model's own basis.
        value: Of the values.
        output: Of the attention output, every query on the stored prompt, the layer's input exact.
        last: (Hq, D) attention output of the prompt's last token on the stored prompt.
        nbytes: What the layer's keys and values take in storage.
    """

    key: float
    value: float
    output: float
    last: Tensor
    nbytes: int


def layer_error(view: LayerView, method: BoundMethod) -> LayerError:
    """Store a layer's exact states as a method does, read them, and attend to them."""
    layer = empty_layer(view, method)
    step, _ = layer.update(view.keys[None], view.values[None])
    layer.store(view.query[None], step, view.scaling, view.softcap)
    keys, values = stored_states(layer)
    mask = None if view.mask is None else view.mask[None, None]
    out = layer.attend(nn.Identity(), view.query[None], step, mask, view.scaling, view.softcap)[0]
    return LayerError(
        _distance(keys, view.keys),
        _distance(values, view.values),
        _distance(out, view.attend()),
        out[:, -1],
        layer.row_nbytes(0),
    )


def layer_size(
    view: LayerView, method: BoundMethod, *, all_queries: bool, at_once: int | None = None
) -> tuple[int, int]:
    """Bytes that a layer's tokens take as a method stores them, and the numbers they stand for.

    Args:
        view: The layer.
        method: What stores it.
        all_queries: Let every query attend, for methods that look at attention; else the last of
            a part does, which is much faster.
        at_once: The prompt's tokens; those after it are taken for generated, all in one step. None
            is all.
    """
    layer = empty_layer(view, method)
    for part in _parts(view.keys.shape[1], at_once):
        _show(layer.observed, view, part)
        step, _ = layer.update(view.keys[None, :, part], view.values[None, :, part])
        query, mask = view.query[None, :, part], None
        if not all_queries:
            query = query[:, :, -1:]
        elif view.mask is not None:
            mask = view.mask[None, None, part, : part.stop]
        layer.attend(nn.Identity(), query, step, mask, view.scaling, view.softcap)
    return layer.row_nbytes(0), layer.elements[0]


def _parts(tokens: int, at_once: int | None) -> list[slice]:
    """A prompt, and what follows it if anything does."""
    if at_once is None or at_once >= tokens:
        return [slice(0, tokens)]
    return [slice(0, at_once), slice(at_once, tokens)]


def empty_layer(view: LayerView, method: BoundMethod) -> QuantizedLayer:
    """A method's storage of a layer, which knows of the prompt what the model's own would."""
    quantizer = method.quantizers[view.spec.index]
    observed = Observed(method.method.needs, quantizer.key.pre_rope)
    observed.rotary = view.observed.rotary
    _show(observed, view, slice(None))
    spec = method.specs[view.spec.index]
    return QuantizedLayer(quantizer, spec, "quantized_prefill", observed)


def _show(observed: Observed, view: LayerView, part: slice) -> None:
    """What the model shows of some tokens."""
    valid, is_vision = view.observed.valid, view.observed.is_vision
    observed.valid = None if valid is None else valid[:, part]
    observed.is_vision = None if is_vision is None else is_vision[:, part]
    observed.residual[view.spec.index] = view.residual[None, part]


def stored_states(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """Keys and values (H, T, D) of a layer that holds one prompt, in its order and basis."""
    key, value, heads = layer.key_store, layer.value_store, layer.spec.num_kv_heads
    if min(key.lengths) < max(layer.tokens):
        raise UserError("a method that evicts tokens has no error of each stored token.")
    order = key.slots().data.argsort(2)[..., None]
    keys, values = (
        side.data.take_along_dim(order, 2).reshape(1, heads, -1, layer.spec.head_dim)
        for side in layer.read()
    )
    return _undone(keys, key.transform, "key"), _undone(values, value.transform, "value")


def _undone(states: Tensor, transform: Transform, name: str) -> Tensor:
    """Read states (1, H, T, C) back in the model's basis, (H, T, D) float32.

    Keys meet queries as attend(q) · k, so row d of attend(identity) is what channel d is read by.
    Values are brought back by attend itself.
    """
    wide = states.float()
    if name == "value":
        return transform.attend(wide)[0]
    unit = torch.eye(wide.shape[-1], device=wide.device).expand(1, states.shape[1], -1, -1)
    return (wide @ transform.attend(unit).transpose(2, 3))[0]


def _distance(stored: Tensor, exact: Tensor) -> float:
    """‖stored - exact‖ / ‖exact‖."""
    exact = exact.float()
    return float((stored.float() - exact).norm() / exact.norm().clamp_min(1e-30))
