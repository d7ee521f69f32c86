"""Changes of basis: rotation, channel scale, channel order across heads."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from kvbench.cache.contract import LayerSpec, Tokens, Transform
from kvbench.cache.hadamard import Rotation, rotation
from kvbench.errors import UserError
from kvbench.kernels.hadamard import hadamard
from kvbench.kernels.launch import use_triton


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Query heads by the key/value head they share, (B, Hq, n, D) to (B, H, Hq / H, n, D)."""
    return x.unflatten(1, (kv_heads, -1))


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Constant:
    """A constant that follows its input's device and dtype, copied once for each."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """The constant for a floating-point partner; whole numbers keep their dtype."""
        dtype = x.dtype if self.value.is_floating_point() else self.value.dtype
        key = (x.device, dtype)
        if key not in self._copies:
            self._copies[key] = self.value.to(*key)
        return self._copies[key]


class _Turn:
    """A rotation as a matrix of float64 numbers and, if it is Hadamard's, as one of ±1."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = _Constant(matrix)
        self.signs = _Constant(matrix.sign().to(torch.int8))


@cache
def fast_hadamard() -> Callable[[Tensor, float], Tensor] | None:
    """The CUDA kernel of the package fast-hadamard-transform, where it is installed."""
    try:
        module = import_module("fast_hadamard_transform")
    except ImportError:
        return None
    kernel: Callable[[Tensor, float], Tensor] = module.hadamard_transform
    return kernel


def on_gpu(x: Tensor) -> bool:
    """Whether CUDA kernels can work on a tensor."""
    return x.is_cuda


class Rotate(Transform):
    """x R with an orthogonal R on keys and values, q R on queries, o Rᵀ on outputs.

    Computed in float32 (float64 for a float64 model) and cast back, as QuaRot does it.
    AKVQ-VL, Figures 6 and 7. `side` says whether `attend` sees queries or attention outputs.
    """

    def __init__(
        self, head_dim: int, side: str, kind: Rotation = "hadamard", seed: int = 0
    ) -> None:
        """Build R.

        Raises:
            UserError: there is no such rotation.
        """
        matrix = rotation(head_dim, kind, seed)
        self.is_sylvester = kind == "hadamard" and head_dim & (head_dim - 1) == 0
        self._hadamard = kind == "hadamard"
        self._store = _Turn(matrix)
        self._attend = _Turn(matrix if side == "key" else matrix.T.contiguous())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) times R."""
        return self._turned(x, self._store)

    def attend(self, x: Tensor) -> Tensor:
        """(B, Hq, n, D) times R (queries) or Rᵀ (outputs)."""
        return self._turned(x, self._attend)

    def _turned(self, x: Tensor, turn: _Turn) -> Tensor:
        scale = x.shape[-1] ** -0.5
        fast = fast_hadamard() if self.is_sylvester and on_gpu(x) else None
        if fast is not None:
            # Sylvester's matrix is symmetric: R and Rᵀ are one.
            return fast(_wide(x).contiguous(), scale).to(x.dtype)
        if self._hadamard and use_triton(x):
            return hadamard(x, scale, None if self.is_sylvester else turn.signs.like(x))
        wide = _wide(x)
        return (wide @ turn.matrix.like(wide)).to(x.dtype)

    def matrices(self, spec: LayerSpec) -> Tensor:
        """R for every head."""
        return self._store.matrix.value.expand(spec.num_kv_heads, -1, -1)


class ChannelScale(Transform):
    """x / s stored, q · s or o · s in attention; s is (H, D), a factor a channel (SmoothQuant)."""

    def __init__(self, scale: Tensor) -> None:
        """Keep s.

        Raises:
            UserError: s is not positive and finite.
        """
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise UserError("channel scales must be positive and finite; calibrate again.")
        self._scale = _Constant(scale.double())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) divided by s."""
        wide = _wide(x)
        return (wide / self._scale.like(wide).unsqueeze(-2)).to(x.dtype)

    def attend(self, x: Tensor) -> Tensor:
        """(B, Hq, n, D) multiplied by its key/value head's s."""
        wide = _wide(x)
        scale = self._scale.like(wide)
        scaled = _grouped(wide, scale.shape[-2]) * scale[..., None, None, :]
        return scaled.flatten(1, 2).to(x.dtype)

    def matrices(self, spec: LayerSpec) -> Tensor | None:
        """diag(1 / s) for every head."""
        return torch.diag_embed(1 / self._scale.value)


class PromptScale(Transform):
    """A `ChannelScale` of each row's own, measured in its prompt and frozen.

    `measure` gives s from the prompt's states (B, H, n, D) and tokens, as (B, H, D) positive
    numbers; it is kept as float16.
    """

    def __init__(self, measure: Callable[[Tensor, Tokens], Tensor]) -> None:
        """Remember how s is measured."""
        self._measure = measure

    def fit(self, states: Tensor, tokens: Tokens) -> Transform:
        """The scales of these rows."""
        return _RowScale(self._measure(states, tokens).half())


class _RowScale(ChannelScale):
    """What a `PromptScale` measured: s is (B, H, D) float16."""

    def __init__(self, scale: Tensor) -> None:
        self._scale = _Constant(scale)

    def select(self, rows: Tensor) -> Transform:
        return _RowScale(self._scale.value.index_select(0, rows.to(self._scale.value.device)))

    def row_nbytes(self) -> int:
        return self._scale.value[0].nbytes

    def matrices(self, spec: LayerSpec) -> None:
        return None


class MergeHeads(Transform):
    """Stores all heads of a token as one vector, optionally with its channels in another order.

    Groups of a codec then run over heads (SKVQ); `order` is a permutation of the H·D channels.
    `inner` comes before that, on heads: a transform whose own stored shape is (H, D).
    """

    def __init__(
        self, spec: LayerSpec, order: Tensor | None = None, inner: Transform | None = None
    ) -> None:
        """Keep the order and its inverse.

        Raises:
            UserError: the order is no permutation of the channels.
        """
        self._inner = inner or Transform()
        self._heads, channels = spec.num_kv_heads, spec.num_kv_heads * spec.head_dim
        if order is not None and sorted(order.tolist()) != list(range(channels)):
            raise UserError(f"the order of {channels} channels must name each of them once.")
        self._order = None if order is None else _Constant(order)
        self._inverse = None if order is None else _Constant(order.argsort())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) to (B, 1, n, H·D)."""
        flat = self._inner.store(x).transpose(1, 2).flatten(2).unsqueeze(1)
        return flat if self._order is None else flat.index_select(-1, self._order.like(x))

    def read(self, x: Tensor) -> Tensor:
        """(B, 1, n, H·D) back to (B, H, n, D)."""
        flat = x if self._inverse is None else x.index_select(-1, self._inverse.like(x))
        return self._inner.read(flat.squeeze(1).unflatten(-1, (self._heads, -1)).transpose(1, 2))

    def attend(self, x: Tensor) -> Tensor:
        """What the inner transform does."""
        return self._inner.attend(x)

    def fit(self, states: Tensor, tokens: Tokens) -> Transform:
        """The inner transform fitted, heads merged as here."""
        return self._around(self._inner.fit(states, tokens))

    def select(self, rows: Tensor) -> Transform:
        """Keep rows of the inner transform."""
        return self._around(self._inner.select(rows))

    def row_nbytes(self) -> int:
        """What the inner transform remembers."""
        return self._inner.row_nbytes()

    def _around(self, inner: Transform) -> Transform:
        if inner is self._inner:
            return self
        other = copy(self)
        other._inner = inner
        return other

    def stored_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """One head of H·D channels."""
        return 1, spec.num_kv_heads * spec.head_dim
