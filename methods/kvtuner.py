"""KVTuner: bits of keys and values chosen layer by layer (arXiv 2502.04420)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Literal

from kvbench.cache import (
    Affine,
    Calibration,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Residual,
    Side,
    Uniform,
    check_fields,
)
from kvbench.errors import UserError

_WIDTHS = (2, 4, 8)
_PAIRS = re.compile(r"K([248]+)V([248]+)")
_TIER = 8
"""Keys and values of a token share one entry of the plan, whatever bits each of them has."""
_UNIFORM = "K8V4"


@dataclass(frozen=True)
class KVTuner:
    """A pair (key bits, value bits) for each layer, from a table that `kvbench tune` searches.

    `pairs` is ``K8V4`` for all layers, or K and V each followed by a digit a layer: ``K884V422``
    are three layers with (8, 4), (8, 2) and (4, 2). `preset` names a file of `kvbench tune`, whose
    pairs, scheme and sizes are taken over: rows then know the table itself instead of a path.

    `scheme` "per_token" (section 5): keys and values of a token are one group a head, no residual;
    "kivi": keys in groups of `group_size` tokens of a channel, values in groups of `group_size`
    channels of a token, the newest `length mod residual` tokens exact.

    Deviations from the official code: its groups of keys run across channels where the prompt is
    no multiple of 32 tokens, ours leave the remainder exact, with the values of the same tokens;
    it decodes and quantizes the whole history again at every flush, here codes are written once;
    its `force_quant` stores nothing where the prompt is a multiple of the residual. The zero point
    is rounded before it is shifted, which differs in exact ties; per-head tables are left out.
    """

    label: ClassVar[str] = "KVTuner"
    paper: ClassVar[str] = "arXiv 2502.04420"
    needs: ClassVar[Needs] = Needs()
    layer_choices: ClassVar[tuple[str, ...]] = tuple(
        f"K{key}V{value}" for key, value in product(reversed(_WIDTHS), repeat=2)
    )
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"pairs": layer_choices}

    pairs: str = _UNIFORM
    scheme: Literal["per_token", "kivi"] = "per_token"
    group_size: int = 32
    residual: int = 32
    preset: str = ""

    def __post_init__(self) -> None:
        """Take a preset over and validate.

        Raises:
            UserError: the preset can't be read or comes with pairs beside it, the pairs are none,
                or groups of keys would straddle a flush.
        """
        check_fields(self)
        if self.preset:
            self._take(Path(self.preset))
        match = _PAIRS.fullmatch(self.pairs)
        if match is None or len(set(map(len, match.groups()))) > 1:
            raise UserError(
                f"KVTuner's pairs {self.pairs!r} must be K and V, each followed by one digit of "
                "2, 4 or 8, or by as many digits as the model has layers, such as K8V4 or K884V422."
            )
        if self.group_size < 1 or self.residual < 1 or self.residual % self.group_size:
            raise UserError(
                f"KVTuner's residual ({self.residual}) must be a multiple of its group size "
                f"({self.group_size})."
            )

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """The layer's own pair of codecs."""
        key_bits, value_bits = self._bits(spec)
        if self.scheme == "per_token":
            key, value = (Affine(bits, spec.head_dim) for bits in (key_bits, value_bits))
            window = None
        else:
            key = Affine(key_bits, self.group_size, along="tokens")
            value = Affine(value_bits, min(self.group_size, spec.head_dim))
            window = Residual(self.residual)
        key_side, value_side = (Side({_TIER: codec}, window=window) for codec in (key, value))
        return LayerQuantizer(key_side, value_side, Uniform(_TIER))

    def with_layers(self, choices: Sequence[str]) -> KVTuner:
        """The same with one of `layer_choices` for each layer."""
        if len(set(choices)) == 1:
            return replace(self, pairs=choices[0])
        keys, values = ("".join(choice[place] for choice in choices) for place in (1, 3))
        return replace(self, pairs=f"K{keys}V{values}")

    def _bits(self, spec: LayerSpec) -> tuple[int, int]:
        keys, values = self.pairs[1:].split("V")
        if len(keys) not in (1, spec.num_layers):
            raise UserError(
                f"KVTuner's table has {len(keys)} layers where the model has {spec.num_layers}; "
                "use a preset of this model (`kvbench tune`), or one pair for all layers."
            )
        place = 0 if len(keys) == 1 else spec.index
        return int(keys[place]), int(values[place])

    def _take(self, path: Path) -> None:
        """Replace the preset's name by its content."""
        if self.pairs != _UNIFORM:
            raise UserError("KVTuner takes its pairs from a preset or as a field, not from both.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            parameters = content["parameters"]
            for name in ("pairs", "scheme", "group_size", "residual"):
                object.__setattr__(self, name, parameters[name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"KVTuner's preset {path} can't be read ({type(error).__name__}: {error}); give a "
                "preset.json that `kvbench tune` wrote."
            ) from error
        object.__setattr__(self, "preset", "")
        check_fields(self)


METHODS: dict[str, KVQuantizer] = {"kvtuner": KVTuner()}
