"""What kernels read and write: packed states of one side, and spans of tokens to attend to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvbench.kernels.packing import unpack

Zero = Literal["int", "float", "symmetric"]
Along = Literal["channels", "tokens"]


@dataclass(frozen=True)
class PackedStates:
    """Keys or values of one precision, B rows of H heads with room for N tokens of D channels.

    codes is (B, H, N, D · bits / 8) uint8, packed as `kvbench.kernels.packing` says. Groups along
    channels: scale and zero are (B, H, N, D / group). Groups along tokens: (B, H, N / group, D).
    A number is (code - zero) · scale with an int16 zero ("int"), code · scale + zero with a float16
    zero ("float"), or (code - 2^(bits - 1)) · scale where zero is None ("symmetric"). Scales are
    float16. Tensors may be views: only the last dimension must be contiguous.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    along: Along = "channels"

    @property
    def zero_kind(self) -> Zero:
        """Which of the three formulas decodes."""
        if self.zero is None:
            return "symmetric"
        return "float" if self.zero.is_floating_point() else "int"

    @property
    def channels(self) -> int:
        """D."""
        return self.codes.shape[-1] * 8 // self.bits

    @property
    def tensors(self) -> list[Tensor]:
        """Codes, scale and zero, if there is one."""
        return [t for t in (self.codes, self.scale, self.zero) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and metadata."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, rows: slice) -> PackedStates:
        """Views of some rows, as of a tensor."""
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)

    def dequantized(self) -> Tensor:
        """(B, H, N, D) float32, in plain torch: the reference of every kernel that reads codes."""
        codes = unpack(self.codes, self.bits).float()
        scale = self._spread(self.scale)
        if self.zero is None:
            return (codes - 2 ** (self.bits - 1)) * scale
        zero = self._spread(self.zero)
        return (codes - zero) * scale if self.zero_kind == "int" else codes * scale + zero

    def _spread(self, meta: Tensor) -> Tensor:
        """Metadata repeated for every number of its group."""
        return meta.float().repeat_interleave(self.group, 2 if self.along == "tokens" else 3)


States = PackedStates | Tensor
"""Packed states, or exact ones (B, H, N, D)."""


@dataclass(frozen=True)
class Span:
    """Tokens of each row that one query attends to: `lengths[b]` of them, keys beside values.

    Token i of row b is keys[b, :, (key_starts[b] + i) mod N] and values[b, :, (value_starts[b] + i)
    mod N'], with starts of zero where they are None. `columns`, for a sliding window, is each
    token's place in the sequence in the order of the keys. All are int32 on the device: no length
    is ever known to the host, so that a captured graph can go on while rows grow.
    """

    keys: States
    values: States
    lengths: Tensor
    """(B,) int32."""
    key_starts: Tensor | None = None
    """(B,) int32."""
    value_starts: Tensor | None = None
    """(B,) int32."""
    columns: Tensor | None = None
    """(B, N) int32."""

    def __getitem__(self, rows: slice) -> Span:
        """The same for some rows: views of everything."""
        per_row = (self.key_starts, self.value_starts, self.columns)
        rest = (None if of is None else of[rows] for of in per_row)
        return Span(self.keys[rows], self.values[rows], self.lengths[rows], *rest)


def states_of(states: States) -> Tensor:
    """Exact states or packed codes: (B, H, N, ...)."""
    return states if isinstance(states, Tensor) else states.codes


def exact(states: States) -> Tensor:
    """States as a plain tensor."""
    return states if isinstance(states, Tensor) else states.dequantized()


def taken(states: States, starts: Tensor | None, width: int) -> Tensor:
    """The first `width` tokens of each row from its start on, wrapped: (B, H, width, D)."""
    full = exact(states)
    index = torch.arange(width, device=full.device).expand(full.shape[0], -1)
    if starts is not None:
        index = (index + starts[:, None].long()) % full.shape[2]
    return full.take_along_dim(index[:, None, :, None], 2)
