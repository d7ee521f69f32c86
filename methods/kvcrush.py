"""KVCrush: fewer tokens, with representatives of those that go (arXiv 2503.00022)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kvbench.cache import (
    EVICTED,
    Calibration,
    DeferringPlan,
    ForeignCache,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Plan,
    Tokens,
    check_fields,
    column_mass,
    resolve,
)
from kvbench.errors import UserError

_NOTHING = "fp16"


@dataclass(frozen=True)
class KVCrush:
    """Keeps the share `keep` of a prompt and evicts the rest; what stays is stored as `base` says.

    The first `start` and the newest `recent` tokens stay. Of the room that is left, a share goes to
    representatives and the rest to the tokens that draw most attention from the newest `window`
    queries (SnapKV), over all heads. A token's signature has a bit a head: whether it is in the
    upper half of what the head would evict. Tokens that are neither kept nor important are sorted
    by the Hamming distance of their signature to an anchor, and evenly spaced ones among them stay.

    `kvcrush+akvq_vl` is short for `kvcrush[base=akvq_vl]`: any method that kvbench stores, with
    parameters of its own in brackets. It sees the tokens that stay as if they were the prompt.

    Two implementations were read, and differ. From OpenVINO GenAI: one set of tokens a layer, a
    random anchor, spacing by floor(candidates / representatives), sizes of start and recent; there
    whole blocks of tokens stay or go, here single tokens. From the vLLM fork: a quarter of the room
    for representatives, scores from the 16 newest queries. Ties in distance keep the order of the
    sequence. Generated tokens are never evicted.
    """

    label: ClassVar[str] = "KVCrush"
    paper: ClassVar[str] = "arXiv 2503.00022"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "keep": (0.1, 0.12, 0.14, 0.16, 0.17, 0.2, 0.25, 0.26, 0.3, 0.5),
        "start": (4, 32),
        "recent": (16, 64, 128),
    }

    base: str = _NOTHING
    keep: float = 0.25
    start: int = 32
    recent: int = 128
    window: int = 16
    representatives: float = 0.25
    anchor: Literal["random", "mean", "zeros", "ones", "alternate"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a value out of range, or a base that can't store what stays.
        """
        check_fields(self)
        for name in ("keep", "representatives"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UserError(f"KVCrush's {name} must lie in [0, 1]: it is a share.")
        if self.start < 1 or self.recent < 1 or self.window < 1 or self.seed < 0:
            raise UserError(
                "KVCrush's start, recent and window must be 1 at least (a query must see a token), "
                "and its seed can't be negative."
            )
        if self.base != _NOTHING:  # which is always there, and being registered itself
            self.stored_as()

    @property
    def needs(self) -> Needs:
        """What the base needs."""
        return Needs() if self.base == _NOTHING else self.stored_as().needs

    def stored_as(self) -> KVQuantizer:
        """The base.

        Raises:
            UserError: it is unknown, evicts tokens itself, or is not stored by kvbench.
        """
        try:
            base = resolve(self.base)
        except UserError as error:
            raise UserError(f"KVCrush's base can't be used: {error}") from error
        if isinstance(base, ForeignCache):
            raise UserError(
                f"KVCrush can't evict from {self.base}, which brings a cache of its own; choose a "
                "base that kvbench stores."
            )
        if isinstance(base, KVCrush):
            raise UserError("KVCrush can't be its own base; choose a method that quantizes.")
        return base

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """The base's storage behind a plan that evicts.

        Raises:
            UserError: the base evicts tokens, too.
        """
        stored = self.stored_as().layer(spec, calibration)
        if stored.evicts:
            raise UserError(f"KVCrush can't use {self.base}: it evicts tokens, too.")
        kind = _Deferring if isinstance(stored.plan, DeferringPlan) else _Crushed
        plan = kind(self, stored.plan, spec.index)
        return replace(stored, plan=plan, evicts=True, sparse_tiers=())


@dataclass(frozen=True)
class _Crushed:
    method: KVCrush
    base: Plan
    layer: int

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8, or (B, H, n) if the base answers so."""
        count = tokens.valid.shape[1]
        newest = torch.arange(count - min(self.method.window, count), count)
        mass = column_mass(tokens, newest.expand(len(tokens.valid), -1)).cpu()
        stays = torch.zeros_like(tokens.valid)
        for row, valid in enumerate(tokens.valid):
            columns = valid.nonzero().squeeze(1)
            stays[row, columns[self._kept(mass[row][:, columns])]] = True
        tiers = self.base.prompt(tokens).cpu()
        gone = ~stays if tiers.dim() == 2 else ~stays[:, None]
        return tiers.masked_fill(gone, EVICTED)

    def generated(self, tokens: Tokens) -> Tensor:
        """What the base says."""
        return self.base.generated(tokens)

    def _kept(self, mass: Tensor) -> Tensor:
        """Sorted positions of the tokens that stay, from the attention (H, n) that they draw."""
        how, count = self.method, mass.shape[1]
        places = torch.arange(count)
        first, last = places[: how.start], places[max(count - how.recent, how.start) :]
        room = max(int(how.keep * count) - len(first) - len(last), 0)
        middle = places[how.start : max(count - how.recent, how.start)]
        representatives = int(how.representatives * room)
        score = mass[:, middle]
        order = score.sum(0).argsort(descending=True, stable=True)
        important, others = order.tensor_split([room - representatives])
        others = others.sort().values
        chosen = self._spread(self._signatures(score)[:, others], representatives)
        return torch.cat((first, middle[important], middle[others[chosen]], last)).sort().values

    def _signatures(self, score: Tensor) -> Tensor:
        """(H, n) bool: the upper half of each head."""
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return rank < score.shape[1] // 2

    def _spread(self, signatures: Tensor, count: int) -> Tensor:
        """Positions of `count` tokens evenly spaced by their distance to the anchor."""
        total = signatures.shape[1]
        if count >= total or not count:
            return torch.arange(min(count, total))
        distance = (signatures != self._anchor(signatures)[:, None]).sum(0)
        order = distance.argsort(stable=True)
        return order[torch.arange(count) * (total // count)]

    def _anchor(self, signatures: Tensor) -> Tensor:
        """(H,) bool."""
        heads, kind = signatures.shape[0], self.method.anchor
        if kind == "mean":
            return signatures.float().mean(1) > 0.5
        if kind == "random":
            source = torch.Generator().manual_seed(self.method.seed + self.layer)
            return torch.rand(heads, generator=source) < 0.5
        if kind == "alternate":
            return torch.arange(heads) % 2 == 1
        return torch.full((heads,), kind == "ones")


@dataclass(frozen=True)
class _Deferring(_Crushed):
    def settle(self, mass: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """What the base says."""
        tiers: Tensor = self.base.settle(mass, lengths)  # type: ignore[attr-defined]
        return tiers


METHODS: dict[str, KVQuantizer] = {"kvcrush": KVCrush()}
