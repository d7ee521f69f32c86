"""MiKV: no token is lost, important ones keep a high precision (arXiv 2402.18096)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import (
    EXACT,
    Affine,
    Calibration,
    HeavyHitters,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    PromptScale,
    Side,
    Tokens,
    Transform,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError


@dataclass(frozen=True)
class MiKV:
    """Per key/value head, a share of the tokens at high precision and all others at low (eq. 1).

    Important are, in halves, the newest tokens and those that have drawn most attention since the
    prompt began (H2O). After every step floor(ratio · length) remain important; what is demoted
    never returns. Keys are balanced against queries channel by channel (eq. 2-4), by the prompt's
    extremes. `group_size` 0 is half a head, so that no group mixes the halves that RoPE pairs.

    No official code is known. Where accounts of the paper are silent: the share is taken of the
    length so far; of an odd number the larger part is new; a group of query heads adds its scores
    and takes its largest query; the balancer is kept within [1e-4, 1e4]; a token demoted from
    `high_bits` below 16 is encoded from its decoded value.
    """

    label: ClassVar[str] = "MiKV"
    paper: ClassVar[str] = "arXiv 2402.18096"
    needs: ClassVar[Needs] = Needs()
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "bits": (2, 3, 4),
        "group_size": (0, 64, 128),
        "ratio": (0.01, 0.05, 0.1, 0.2),
    }

    bits: int = 2
    high_bits: Literal[16, 8, 4] = 16
    ratio: float = 0.2
    recent_share: float = 0.5
    group_size: int = 0
    balance: bool = True

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a share outside [0, 1] or a negative group size.
        """
        check_fields(self)
        if self.group_size < 0:
            raise UserError(f"MiKV's group size can't be negative ({self.group_size}).")
        HeavyHitters(self.ratio, self.recent_share)

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One packed tier, and a window that ranks tokens by attention."""
        group = min(self.group_size or spec.head_dim // 2, spec.head_dim)
        low = {self.bits: Affine(self.bits, group, zero="float")}
        high = None if self.high_bits == EXACT else Affine(self.high_bits, group, zero="float")
        window = HeavyHitters(self.ratio, self.recent_share)
        balancer = PromptScale(_balance) if self.balance else Transform()
        key = Side(low, balancer, window, high)
        value = Side(low, window=window, recent=high)
        return LayerQuantizer(key, value, Uniform(self.bits), heads_apart=True)


def _balance(keys: Tensor, tokens: Tokens) -> Tensor:
    """(B, H, D) sqrt(max|k| / max|q|), by which keys are divided and queries multiplied."""
    if tokens.attention is None:
        raise UserError("MiKV's balancer needs the prompt's queries.")
    queries = tokens.attention.query.unflatten(1, (keys.shape[1], -1)).abs().amax(2)
    padding = ~tokens.valid.to(keys.device)[:, None, :, None]
    largest, asked = (
        states.abs().masked_fill(padding, 0).amax(2).float() for states in (keys, queries)
    )
    alive = (largest > 0) & (asked > 0)
    return torch.where(alive, (largest / asked).sqrt(), 1.0).clamp(1e-4, 1e4)


METHODS: dict[str, KVQuantizer] = {"mikv": MiKV()}
