"""What the cache must see of a running model: padding, modality, positions, residual stream.

transformers hands a cache keys and values only. Forward pre-hooks bring the rest to any
`QuantizedCache` that is passed as `cache`, and leave every other call alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.contract import Needs
from kvbench.cache.rotary import RotaryPositions
from kvbench.errors import UserError


class Observed:
    """What was seen in the forward call under way; tensors are on the host except `residual`."""

    def __init__(self, needs: Needs, pre_rope: bool, vision_mask: Tensor | None = None) -> None:
        """Nothing seen yet; `vision_mask` (B, T) bool stands in for ids of embedded prompts."""
        self.needs, self.pre_rope, self._vision_mask = needs, pre_rope, vision_mask
        self.valid: Tensor | None = None
        self.is_vision: Tensor | None = None
        self.residual: dict[int, Tensor] = {}
        self.rotary = RotaryPositions()
        self.first = True
        """Whether the call is a cache's first: its prompt."""
        self._seen = 0

    def forget(self) -> None:
        """Be ready for another prompt."""
        self.valid, self.is_vision, self._seen, self.first = None, None, 0, True
        self.residual.clear()
        self.rotary.ids = None

    def see_inputs(self, image_ids: tuple[int, ...], call: dict[str, Any]) -> None:
        """The top-level model's keyword arguments, once a forward call.

        Raises:
            UserError: modality is needed but the prompt came as embeddings without a mask.
        """
        ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            return
        new = given.shape[1]
        mask = call.get("attention_mask")
        # Only a 2-d mask speaks of padding; 4-d masks come ready-made for attention.
        self.valid = mask[:, -new:].bool().cpu() if mask is not None and mask.dim() == 2 else None
        if self.needs.modality:
            self.is_vision = self._modality(image_ids, ids, given)
        self.first = not self._seen
        self._seen += new

    def _modality(self, image_ids: tuple[int, ...], ids: Tensor | None, given: Tensor) -> Tensor:
        rows, new = given.shape[:2]
        if self._vision_mask is not None and self._vision_mask.shape[1] >= self._seen + new:
            mask = self._vision_mask[:, self._seen : self._seen + new].bool().cpu()
            if rows % len(mask):
                raise UserError(f"vision_mask has {len(mask)} rows but the prompt has {rows}.")
            return mask.repeat_interleave(rows // len(mask), 0)  # beams of a prompt stand together
        if ids is None and image_ids and new > 1:
            raise UserError(
                "this method must know which tokens are vision, but the prompt came as "
                "inputs_embeds; pass quantized_cache(..., vision_mask=(B, T) bool)."
            )
        if ids is None or not image_ids:
            return torch.zeros(rows, new, dtype=torch.bool)
        return torch.isin(ids.cpu(), torch.tensor(image_ids))


class _Hooks:
    """Forward pre-hooks on one model, shared by all of its live caches."""

    def __init__(self, model: nn.Module) -> None:
        self.users = 0
        self._active: Observed | None = None
        self._handles: list[Any] = []
        self._image_ids = image_token_ids(model.config)
        stack = decoder_stack(model)
        self._hook(model, self._top)
        for index, layer in enumerate(stack.layers):
            self._hook(layer, self._layer_hook(index))
        if hasattr(stack, "rotary_emb"):
            self._hook(stack.rotary_emb, self._rotary)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, function: Any) -> None:
        self._handles.append(module.register_forward_pre_hook(function, with_kwargs=True))

    def _top(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active = _observed(kwargs)
        if self._active is not None:
            call = dict(kwargs)
            if args and call.get("input_ids") is None:
                call["input_ids"] = args[0]
            self._active.see_inputs(self._image_ids, call)

    def _layer_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            observed = _observed(kwargs)
            if observed is not None and observed.needs.residual and observed.first:
                hidden = args[0] if args else kwargs["hidden_states"]
                observed.residual[index] = hidden.to(_device(module, hidden))

        return hook

    def _rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active is not None and self._active.pre_rope:
            ids = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
            if ids is not None:
                self._active.rotary.append(module, ids)


def _device(module: nn.Module, hidden: Tensor) -> torch.device | str | int:
    """Where a layer computes: accelerate moves its inputs there after this has seen them."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return hidden.device if device is None else device


def _observed(kwargs: dict[str, Any]) -> Observed | None:
    # transformers 5.24 calls `past_key_values` `cache`; models outside it keep the older name.
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    return getattr(cache, "observed", None)


_HOOKS: weakref.WeakKeyDictionary[nn.Module, _Hooks] = weakref.WeakKeyDictionary()


def attach(model: nn.Module) -> None:
    """Observe `model`; every call must be matched by one of `detach`."""
    if model not in _HOOKS:
        _HOOKS[model] = _Hooks(model)
    _HOOKS[model].users += 1


def detach(model: nn.Module) -> None:
    """Take the hooks off when their last user is gone."""
    hooks = _HOOKS.get(model)
    if hooks is None:
        return
    hooks.users -= 1
    if hooks.users == 0:
        hooks.remove()
        del _HOOKS[model]


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Observe `model` for the length of a with block."""
    attach(model)
    try:
        yield
    finally:
        detach(model)


def decoder_stack(model: nn.Module) -> Any:
    """The module that holds token embeddings and decoder layers.

    Raises:
        UserError: the model has none.
    """
    for module in model.modules():
        if hasattr(module, "embed_tokens") and hasattr(module, "layers"):
            return module
    raise UserError(f"{type(model).__name__} has no decoder stack that kvbench knows how to cache.")


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of the placeholders that images and videos expand to; empty for text models."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(sorted({value for value in found if isinstance(value, int)}))
