"""What a method implements: four small parts and one function.

A method is a frozen dataclass of hyper-parameters with `layer(spec, calibration)`, which composes a
transform, codecs and a window for keys and for values, and a plan that hands a tier to each token.
It never sees a model, a cache or a loop over layers; the cache owns everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

EXACT = 16
"""The tier that keeps a token in the model's own 16-bit (or wider) dtype."""
EVICTED = 0
"""The tier of tokens that are not stored at all."""
DEFERRED = -1
"""The tier of tokens that the plan settles when they leave the window."""

Protocols = Literal["quantized_prefill", "exact_prefill", "sparse_prefill"]
Packed = tuple[Tensor, ...]
"""Codes and metadata of one segment; every tensor is (B, H, n / block, ...)."""
LogitMap = Callable[[Tensor, Tensor], Tensor]
"""New logits from (B, Hq, n, T) logits and the (B, 1, n, T) bool mask of those that it is for."""


@dataclass(frozen=True)
class LayerSpec:
    """One attention layer: what a method may look at when it decides how to store it."""

    index: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    text_salient: bool = False
    """Text-salient attention (TSA) layer: AKVQ-VL, Table I."""
    sliding_window: int | None = None


@dataclass(frozen=True)
class SelfAttention:
    """What n new tokens attend with, exact and after RoPE: see `kvbench.cache.mass`."""

    query: Tensor
    """(B, Hq, n, D)."""
    keys: Tensor
    """(B, H, n, D)."""
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Facts about n new tokens of B rows; a field that the method did not ask for is None."""

    valid: Tensor
    """(B, n) bool, False on padding."""
    is_vision: Tensor | None = None
    """(B, n) bool, True where an image or video placeholder produced the token."""
    residual: Tensor | None = None
    """(B, n, hidden) residual stream entering the layer; prompt only."""
    attention: SelfAttention | None = None
    """Queries and keys of these tokens; None where nothing runs and only sizes are asked for."""
    before: tuple[int, ...] | None = None
    """Valid tokens that each row had seen before; None where nothing runs."""


@dataclass(frozen=True)
class Needs:
    """What must be observed or calibrated before a method can run."""

    modality: bool = False
    residual: bool = False
    statistics: tuple[str, ...] = ()
    """Names of calibrated statistics, see `kvbench.cache.statistics.STATISTICS`."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of one model: name -> (layers, ...) float32, and where they come from."""

    statistics: Mapping[str, Tensor]
    manifest: Mapping[str, str] = field(default_factory=dict)

    def of(self, name: str, layer: int) -> Tensor:
        """The statistic `name` of one layer."""
        return self.statistics[name][layer]

    def only(self, names: Collection[str]) -> Calibration:
        """The statistics of such names."""
        return Calibration({name: self.statistics[name] for name in names}, self.manifest)


class Transform:
    """An invertible change of basis of one side; the identity unless overridden.

    Attention stays exact when nothing is quantized. For keys: attend(q) · read(store(k)) = q · k.
    For values, with attention weights p: attend(p · read(store(v))) = p · v.
    """

    def store(self, x: Tensor) -> Tensor:
        """States on their way into the cache, (B, H, n, D) to the stored shape (B, H', n, C)."""
        return x

    def read(self, x: Tensor) -> Tensor:
        """Stored states on their way into attention, (B, H', n, C) to (B, H, n, D)."""
        return x

    def attend(self, x: Tensor) -> Tensor:
        """Query (key side) or attention output (value side), (B, Hq, n, D)."""
        return x

    def fit(self, states: Tensor, tokens: Tokens) -> Transform:
        """The change of basis for rows whose prompt has such states (B, H, n, D); itself if fixed.

        It stays theirs from then on. `tokens.attention` holds queries and keys.
        """
        return self

    def select(self, rows: Tensor) -> Transform:
        """After `fit`: keep rows by index, repeats allowed."""
        return self

    def row_nbytes(self) -> int:
        """Bytes that `fit` has to remember for each row."""
        return 0

    def stored_shape(self, spec: LayerSpec) -> tuple[int, int]:
        """(H', C): heads and channels a head in storage."""
        return spec.num_kv_heads, spec.head_dim

    def matrices(self, spec: LayerSpec) -> Tensor | None:
        """(H, D, D) float64 M with store(x) = x M, if the transform can be folded into weights."""
        return None


class Codec(Protocol):
    """Turns numbers into packed codes with metadata and back."""

    @property
    def bits(self) -> int:
        """Nominal bits of a code."""

    @property
    def block(self) -> int | None:
        """Tokens encoded together: 1, or the group size when grouped along tokens.

        None where all tokens of a row that are written together share metadata.
        """

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to packed tensors (B, H, n / block, ...).

        Where block is None each is (B, H, n, ...) or (B, H, 1, ...), and no row is padded.
        """

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Packed tensors to (B, H, n, C)."""

    def bits_per_element(self, channels: int) -> float:
        """Payload and metadata bits of one number."""


class Plan(Protocol):
    """Which tier each token gets. Decided once, when the token arrives.

    Tiers are EXACT, EVICTED, or keys of `Side.codecs`. Answers are (B, n) int8, or (B, H, n) where
    heads are stored apart.
    """

    def prompt(self, tokens: Tokens) -> Tensor:
        """Tiers of the first prompt, the whole of it in view."""

    def generated(self, tokens: Tokens) -> Tensor:
        """Tiers of tokens that come later."""


@runtime_checkable
class DeferringPlan(Plan, Protocol):
    """A plan that answers DEFERRED and decides when tokens leave the window (ZipCache)."""

    def settle(self, mass: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """(R, n) int8 tiers of tokens that leave, from the attention (R, n) of the newest query.

        Row r has lengths[r] of them. R counts rows, times heads where these are apart.
        """


class Window(Protocol):
    """Which of the newest tokens of a row stay exact until they get their tier."""

    @property
    def counts_current(self) -> bool:
        """Whether a decode step shrinks the window before it attends (else after)."""

    def keep(self, length: int, prompt_length: int) -> int:
        """Exact tokens of a row that holds `length` tokens, `prompt_length` of them its prompt."""


@runtime_checkable
class RankingWindow(Window, Protocol):
    """A window that keeps tokens with much accumulated attention, too (MiKV's heavy hitters)."""

    def newest(self, length: int, prompt_length: int) -> int:
        """Of the tokens that `keep` counts, how many are kept for being the newest."""


@dataclass(frozen=True)
class Side:
    """How the keys or the values of a layer are stored."""

    codecs: Mapping[int, Codec] = field(default_factory=dict)
    """Tier -> codec; a tier is mostly the bits of its codes. EXACT and EVICTED need none."""
    transform: Transform = field(default_factory=Transform)
    window: Window | None = None
    recent: Codec | None = None
    """How tokens in the window are stored, one by one; None: exact."""
    pre_rope: bool = False
    """Keys only: store before rotary position embedding, embed again on every read."""


@dataclass(frozen=True)
class LayerQuantizer:
    """Everything the cache must know to store one layer."""

    key: Side
    value: Side
    plan: Plan
    heads_apart: bool = False
    """Whether each key/value head has tiers and a window of its own."""
    evicts: bool = False
    """Whether the plan may answer EVICTED."""
    logit_maps: Mapping[int, LogitMap] = field(default_factory=dict)
    """Tier -> what becomes of the logits of its packed tokens before softmax (CalibQuant)."""
    sparse_tiers: tuple[int, ...] = ()
    """Tiers whose prompt tokens take no part in attention under sparse_prefill (ZipVL)."""

    @property
    def is_exact(self) -> bool:
        """Whether everything is kept as it is."""
        return not (self.key.codecs or self.value.codecs or self.evicts)


@runtime_checkable
class KVQuantizer(Protocol):
    """A method: frozen hyper-parameters and one function."""

    label: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> Needs:
        """What must be observed or calibrated."""

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Compose the storage of one layer.

        Raises:
            UserError: this method can't store such a layer.
        """
