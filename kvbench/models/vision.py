"""Image features: one run of the vision tower an image, however many methods use it."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_KEPT = 8  # results held at most; a sample needs one


class FeatureMemo:
    """Answers `get_image_features` from memory when the same pixels come again.

    Arguments are compared by content, so that copies of the pixels count as the same and tensors
    changed in place do not. Not for several threads.
    """

    def __init__(self, compute: Any, config: Any) -> None:
        self._compute = compute
        self._config = config
        self._names = tuple(inspect.signature(compute).parameters)
        self._entries: list[tuple[dict[str, Any], Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the wrapped function returns for these arguments, in the same type."""
        key = self._settled(dict(zip(self._names, args, strict=False)) | kwargs)
        for known, result in self._entries:
            if _same(known, key):
                return _copied(result)
        result = self._compute(*args, **kwargs)
        self._entries = [*self._entries[1 - _KEPT :], (_frozen(key), _slim(result))]
        return _copied(result)

    def _settled(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments with the model's defaults: generate() omits what forward() spells out."""
        given = {name: value for name, value in arguments.items() if value is not None}
        settings = {
            name: getattr(self._config, name, None) for name in (*self._names, "return_dict")
        }
        return {name: value for name, value in settings.items() if value is not None} | given

    def forget(self) -> None:
        """Drop all results; call it between samples to free their memory."""
        self._entries.clear()


@contextmanager
def shared_vision(model: Any) -> Iterator[FeatureMemo]:
    """Within this context the vision tower of `model` runs once for each distinct pixel input.

    Works for models whose inner model has `get_image_features`, as LLaVA, LLaVA-NeXT, Qwen2-VL and
    others have; has no effect on models without vision.

    Yields:
        The memory, whose `forget()` is to be called between samples.
    """
    inner = getattr(model, "model", model)
    if not hasattr(inner, "get_image_features"):
        yield FeatureMemo(lambda: None, None)
        return
    before = inner.__dict__.get("get_image_features")
    compute = inner.get_image_features
    memo = FeatureMemo(compute, inner.config)

    @functools.wraps(compute)  # generate() reads the signature to learn what to pass
    def remembered(*args: Any, **kwargs: Any) -> Any:
        return memo(*args, **kwargs)

    inner.get_image_features = remembered
    try:
        yield memo
    finally:
        memo.forget()
        if before is None:
            del inner.get_image_features
        else:
            inner.get_image_features = before


def allow_single_tiles(model: Any) -> None:
    """Let a LLaVA-NeXT model take images as single tiles, as LLaVA does for aspect ratio `pad`.

    Where `image_sizes` is not given, pixel values (N, 3, H, W) are N whole images and yield the
    tower's tokens alone, 576 each at 336 pixels and patch 14, with neither further tiles nor a
    line-end token. transformers' own class always adds both.
    """
    inner = model.model
    inner.get_image_features = types.MethodType(_image_features, inner)


def _image_features(
    self: Any,
    pixel_values: Tensor,
    image_sizes: Tensor | None = None,
    vision_feature_layer: int | list[int] | None = None,
    vision_feature_select_strategy: str | None = None,
    **kwargs: Any,
) -> Any:
    """`get_image_features` of LlavaNextModel with `image_sizes` made optional."""
    if image_sizes is not None:
        return type(self).get_image_features(
            self,
            pixel_values,
            image_sizes,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **kwargs,
        )
    layers = vision_feature_layer
    if layers is None:
        layers = self.config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
    output = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
    first = 1 if strategy == "default" else 0  # drops the class token
    chosen = torch.cat([output.hidden_states[layer][:, first:] for layer in layers], dim=-1)
    output.pooler_output = list(self.multi_modal_projector(chosen))
    return output


def _frozen(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in arguments.items()}


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and bool(one == other)
    alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return alike and torch.equal(one, other)


def _slim(result: Any) -> Any:
    """Drop the tower's inner states, which are many times the features' size and read by nobody."""
    result = copy.copy(result)
    for name in ("hidden_states", "attentions"):
        if getattr(result, name, None) is not None:
            setattr(result, name, None)
    return result


def _copied(result: Any) -> Any:
    """A shallow copy, since generate() replaces fields of the result for beams."""
    return copy.copy(result)
