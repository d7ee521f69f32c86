"""Value transforms folded into the projection weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvbench.cache.contract import LayerSpec, Transform
from kvbench.cache.observers import decoder_stack
from kvbench.cache.quantized import BoundMethod
from kvbench.errors import UserError


def fold_values(bound: BoundMethod) -> BoundMethod:
    """Fold every layer's value transform into W_V, its bias and W_O (AKVQ-VL, Figure 7), for good.

    Returns:
        The method to make caches with from now on.

    Raises:
        UserError: a transform has no matrix, or the model's projections aren't separate linears.
    """
    layers = decoder_stack(bound.model).layers
    for layer, quantizer, spec in zip(layers, bound.quantizers, bound.specs, strict=True):
        transform = quantizer.value.transform
        if type(transform) is Transform:
            continue
        matrices = transform.matrices(spec)
        if matrices is None:
            raise UserError("this method's value transform can't be folded into the weights.")
        _fold(layer.self_attn, matrices, spec)
    return bound.values_folded()


def _fold(module: nn.Module, matrices: Tensor, spec: LayerSpec) -> None:
    """Replace v by v M (rows of W_V, bias) and o by o M⁻¹ (columns of W_O), head by head."""
    v_proj, o_proj = getattr(module, "v_proj", None), getattr(module, "o_proj", None)
    if not isinstance(v_proj, nn.Linear) or not isinstance(o_proj, nn.Linear):
        raise UserError("folding needs v_proj and o_proj to be plain linear layers.")
    matrices = matrices.to(v_proj.weight.device)
    heads, width, groups = spec.num_kv_heads, spec.head_dim, spec.num_heads // spec.num_kv_heads
    weight = v_proj.weight.data.double().view(heads, width, -1)
    _replace(v_proj.weight, matrices.mT @ weight)
    if v_proj.bias is not None:
        bias = v_proj.bias.data.double().view(heads, 1, width)
        _replace(v_proj.bias, bias @ matrices)
    columns = o_proj.weight.data.double().view(-1, heads, groups, width)
    inverse = torch.linalg.inv(matrices).mT
    _replace(o_proj.weight, torch.einsum("ohgd,hde->ohge", columns, inverse))


def _replace(parameter: Tensor, value: Tensor) -> None:
    parameter.data.copy_(value.reshape(parameter.shape))
