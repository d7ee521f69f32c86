"""transformers' own quantized cache with its quanto backend: what a user has without kvbench."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, QuantizedCache

from kvbench.cache import ForeignCache, check_fields
from kvbench.cache.contract import Protocols
from kvbench.cache.specs import layer_specs
from kvbench.errors import UserError


@dataclass(frozen=True)
class HFQuanto:
    """`transformers.QuantizedCache("quanto")` as it is.

    The prompt is quantized as a whole; the newest answer tokens are exact, and when they reach
    `residual`, everything is read and quantized again. Groups have a scale and a minimum in the
    model's dtype; they run over neighbours in memory (axis 0: channels, then tokens of a head) or
    over all heads and tokens of a channel (axis -1, where the rows of a batch share groups).

    A prompt attends to its own exact states, so only `exact_prefill` can be had, and only because
    kvbench decodes a prompt's last token on its own: `model.generate` with this cache computes the
    first answer token from exact states. quanto compiles an extension at its first use, which takes
    a C++ compiler (CUDA: nvcc) and minutes.
    """

    label: ClassVar[str] = "HF quanto"
    paper: ClassVar[str] = "-"
    splits_prompt: ClassVar[bool] = True
    concatenates: ClassVar[bool] = False

    bits: Literal[2, 4] = 4
    group_size: int = 64
    residual: int = 128
    axis_key: Literal[0, -1] = 0
    axis_value: Literal[0, -1] = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value out of range.
        """
        check_fields(self)
        for name in ("group_size", "residual"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}.")

    def cache(self, model: nn.Module, protocol: Protocols) -> Cache:
        """An empty cache.

        Raises:
            UserError: optimum-quanto is missing or can't be compiled, the protocol is
                `quantized_prefill`, or the model's layers or the group size don't suit it.
        """
        if protocol != "exact_prefill":
            raise UserError(
                "transformers' QuantizedCache lets a prompt attend to its exact states, so it "
                "can't follow quantized_prefill; use exact_prefill."
            )
        self._check_groups(model)
        try:
            made = QuantizedCache(
                "quanto",
                model.config,  # type: ignore[arg-type]
                nbits=self.bits,
                axis_key=self.axis_key,
                axis_value=self.axis_value,
                q_group_size=self.group_size,
                residual_length=self.residual,
            )
        except ImportError as error:
            raise UserError(
                'the quanto cache needs optimum-quanto; run `pip install "kvbench[peers]"`.'
            ) from error
        except ValueError as error:
            raise UserError(f"transformers' QuantizedCache refuses this model: {error}") from error
        _compile_extension(str(model.device))
        return made

    def nbytes(self, cache: Cache) -> int:
        """Bytes of codes, scales, shifts and exact tokens."""
        states = (value for layer in cache.layers for value in vars(layer).values())
        return sum(tensor.nbytes for tensor in _plain(states))

    def _check_groups(self, model: nn.Module) -> None:
        """Groups must fill a prompt of any length."""
        for spec in layer_specs(model.config):
            for axis in (self.axis_key, self.axis_value):
                numbers = spec.num_kv_heads * (spec.head_dim if axis == 0 else 1)
                if numbers % self.group_size:
                    raise UserError(
                        f"quanto's group_size {self.group_size} must divide the {numbers} numbers "
                        f"of a token along axis {axis}; choose another group_size."
                    )


@cache
def _compile_extension(device: str) -> None:
    """Unpack one byte, so that a missing compiler is found before a run and not in it."""
    unpack: Any = torch.ops.quanto.unpack
    try:
        unpack(torch.zeros(1, 1, dtype=torch.uint8, device=device), 4)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"quanto's extension can't be compiled for {device} ({reason}); install a compiler."
        ) from error


def _plain(states: Iterable[object]) -> Iterable[Tensor]:
    """The tensors with memory of their own in and below quanto's wrappers."""
    for state in states:
        if hasattr(state, "__tensor_flatten__"):
            names, _ = state.__tensor_flatten__()
            yield from _plain(getattr(state, name) for name in names)
        elif isinstance(state, Tensor):
            yield state


METHODS: dict[str, ForeignCache] = {
    "hf_quanto_int4": HFQuanto(bits=4),
    "hf_quanto_int2": HFQuanto(bits=2),
}
