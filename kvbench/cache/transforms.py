"""Changes of basis: rotation, channel scale, channel order across heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.cache.contract import LayerSpec, Transform
from kvbench.cache.hadamard import Rotation, rotation
from kvbench.errors import UserError


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Query heads by the key/value head they share, (B, Hq, n, D) to (B, H, Hq / H, n, D)."""
    return x.unflatten(1, (kv_heads, -1))


class _OnDevice:
    """A constant that follows its input's device, copied once a device."""

    def __init__(self, value: Tensor) -> None:
        self._copies = {value.device: value}
        self._value = value

    def like(self, x: Tensor) -> Tensor:
        if x.device not in self._copies:
            self._copies[x.device] = self._value.to(x.device)
        return self._copies[x.device]


class Rotate(Transform):
    """x R with an orthogonal R on keys and values, q R on queries, o Rᵀ on outputs, in float32.

    AKVQ-VL, Figures 6 and 7. `side` says whether `attend` sees queries or attention outputs.
    """

    def __init__(self, head_dim: int, side: str, kind: Rotation = "hadamard", seed: int = 0) -> None:
        """Build R.

        Raises:
            UserError: there is no such rotation.
        """
        self._exact = rotation(head_dim, kind, seed)
        matrix = self._exact.float()
        self._store = _OnDevice(matrix)
        self._attend = _OnDevice(matrix if side == "key" else matrix.T.contiguous())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) times R."""
        return (x.float() @ self._store.like(x)).to(x.dtype)

    def attend(self, x: Tensor) -> Tensor:
        """(B, Hq, n, D) times R (queries) or Rᵀ (outputs)."""
        return (x.float() @ self._attend.like(x)).to(x.dtype)

    def matrices(self, spec: LayerSpec) -> Tensor:
        """R for every head."""
        return self._exact.expand(spec.num_kv_heads, -1, -1)


class ChannelScale(Transform):
    """x / s stored, q · s or o · s in attention; s is (H, D), one factor a channel (SmoothQuant)."""

    def __init__(self, scale: Tensor) -> None:
        """Keep s.

        Raises:
            UserError: s is not positive and finite.
        """
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise UserError("channel scales must be positive and finite; calibrate again.")
        self._scale = _OnDevice(scale.float())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) divided by s."""
        return (x.float() / self._scale.like(x)[:, None]).to(x.dtype)

    def attend(self, x: Tensor) -> Tensor:
        """(B, Hq, n, D) multiplied by its key/value head's s."""
        scale = self._scale.like(x)
        scaled = _grouped(x.float(), scale.shape[0]) * scale[:, None, None]
        return scaled.flatten(1, 2).to(x.dtype)

    def matrices(self, spec: LayerSpec) -> Tensor:
        """diag(1 / s) for every head."""
        return torch.diag_embed(1 / self._scale._value.double())


class MergeHeads(Transform):
    """Stores all heads of a token as one vector, optionally with its channels in another order.

    Groups of a codec then run over heads (SKVQ); `order` is a permutation of the H·D channels.
    """

    def __init__(self, spec: LayerSpec, order: Tensor | None = None) -> None:
        """Keep the order and its inverse."""
        self._heads, channels = spec.num_kv_heads, spec.num_kv_heads * spec.head_dim
        order = torch.arange(channels) if order is None else order
        self._order, self._inverse = _OnDevice(order), _OnDevice(order.argsort())

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) to (B, 1, n, H·D)."""
        flat = x.transpose(1, 2).flatten(2)
        return flat[..., self._order.like(x)].unsqueeze(1)

    def read(self, x: Tensor) -> Tensor:
        """(B, 1, n, H·D) back to (B, H, n, D)."""
        flat = x.squeeze(1)[..., self._inverse.like(x)]
        return flat.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def stored_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """One head of H·D channels."""
        return 1, spec.num_kv_heads * spec.head_dim
