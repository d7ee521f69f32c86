"""TurboQuant: a rotation and a fixed codebook instead of a grid (arXiv 2504.19874)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy import optimize, stats
from scipy.special import beta as beta_function
from torch import Tensor

from kvbench.cache import (
    EXACT,
    Affine,
    Calibration,
    Codec,
    Float8,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Packed,
    Rotate,
    Side,
    Transform,
    Uniform,
    check_fields,
    check_packable,
    pack,
    unpack,
)
from kvbench.errors import UserError

Law = Literal["gaussian", "sphere"]
_HALF_MAX = 65504.0


@lru_cache(maxsize=32)
def lloyd_max(bits: int, law: Law, order: int = 0) -> tuple[float, ...]:
    """The 2^bits ascending centroids of least mean square error, for coordinates of variance one.

    "gaussian" is N(0, 1); "sphere" a coordinate of a uniform unit vector of `order` numbers, times
    √order. A centroid is the mean between its boundaries, a boundary the middle of two centroids.
    """
    count = 2 ** (bits - 1)
    start = stats.norm.ppf(0.5 + (np.arange(count) + 0.5) / (2 * count))

    def miss(upper: np.ndarray) -> np.ndarray:
        edges = np.concatenate(([0.0], (upper[:-1] + upper[1:]) / 2, [np.inf]))
        return _means(edges, law, order) - upper

    solved = optimize.root(miss, start, tol=1e-13)
    upper = np.sort(solved.x)
    return tuple(float(c) for c in np.concatenate((-upper[::-1], upper)))


def _means(edges: np.ndarray, law: Law, order: int) -> np.ndarray:
    """Conditional means between ascending edges, of which the last is infinite."""
    if law == "gaussian":
        mass, moment = stats.norm.sf(edges), stats.norm.pdf(edges)
    else:
        # Density ∝ (1 − t²)^((order − 3) / 2) on [−1, 1]: (1 + t) / 2 is Beta(a, a).
        a, t = (order - 1) / 2, np.clip(edges / np.sqrt(order), -1, 1)
        mass = stats.beta.sf((1 + t) / 2, a, a)
        moment = np.sqrt(order) * (1 - t * t) ** a / (2 * a * beta_function(0.5, a))
    result: np.ndarray = -np.diff(moment) / -np.diff(mass)
    return result


@dataclass(frozen=True)
class Codebook:
    """Norm and nearest centroids of a vector's direction (F6); `norm_correction` makes it F6n.

    Stored are r = ‖x‖ as float16 and a code a channel. x̂ = r c/√D, or r c/‖c‖ with the correction,
    so that the norm is kept. Codes are found in float32, a tie goes up; a zero vector stays zero.
    """

    bits: int
    norm_correction: bool = True
    law: Law = "gaussian"
    block: int = 1

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""
        check_packable(self.bits, channels)

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes (B, H, n, C · bits / 8) uint8 and norms (B, H, n, 1) float16."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        unit = wide / norm.clamp_min(torch.finfo(torch.float32).tiny) * x.shape[-1] ** 0.5
        centroids = _centroids(self.bits, self.law, x.shape[-1], x.device)
        edges = (centroids[:-1] + centroids[1:]) / 2
        codes = torch.bucketize(unit, edges, right=True).to(torch.uint8)
        return pack(codes, self.bits), norm.clamp_max(_HALF_MAX).half()

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and norms to (B, H, n, C)."""
        codes = unpack(packed[0], self.bits).long()
        order = codes.shape[-1]
        chosen = _centroids(self.bits, self.law, order, codes.device)[codes]
        size = chosen.new_tensor(order**0.5)
        if self.norm_correction:
            size = (chosen.square().sum(-1, keepdim=True) + 1e-16).sqrt()
        return (packed[1].float() * (chosen / size)).to(dtype)

    def bits_per_element(self, channels: int) -> float:
        """Codes and 16 bits of norm."""
        return self.bits + 16 / channels


@lru_cache(maxsize=32)
def _centroids(bits: int, law: Law, order: int, device: torch.device) -> Tensor:
    return torch.tensor(lloyd_max(bits, law, order), device=device)


@dataclass(frozen=True)
class TurboQuant:
    """vLLM's TurboQuant: keys in a codebook behind H/√D, values on a grid of their own range.

    `key_bits=8` casts keys to e4m3 instead, with no rotation and no scale (saturating at 448). The
    first and last `skip_layers` layers stay in 16 bits, at most half of all. Every token is stored
    at once, no window, no sink. Deviations from vLLM: centroids are solved exactly, its own are a
    trapezoid sum within 1e-3 of these; scale and minimum of a value are rounded to float16 before
    its codes are made, ties to even; a vector is rotated in its own dtype's precision and then
    normalised; heads whose size is no power of two are rotated with a Paley-Sylvester matrix; a
    prompt follows this tool's protocols, where vLLM's depends on how it was cut into chunks.
    The paper's QJL sketch of the residual, which vLLM leaves out too, is not offered.
    """

    label: ClassVar[str] = "TurboQuant"
    paper: ClassVar[str] = "arXiv 2504.19874"
    needs: ClassVar[Needs] = Needs()
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {"skip_layers": (0, 1, 2, 4)}

    key_bits: Literal[1, 2, 3, 4, 8] = 3
    value_bits: Literal[1, 2, 3, 4, 8] = 4
    norm_correction: bool = True
    rotate_values: bool = False
    skip_layers: int = 2

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative number of layers, or another kind of value.
        """
        check_fields(self)
        if self.skip_layers < 0:
            raise UserError(f"TurboQuant can't skip {self.skip_layers} layers.")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Codebook and grid, or nothing in the first and last layers."""
        skipped = min(self.skip_layers, spec.num_layers // 2)
        if min(spec.index, spec.num_layers - 1 - spec.index) < skipped:
            return LayerQuantizer(Side(), Side(), Uniform(EXACT))
        width, tier = spec.head_dim, self.value_bits
        key = Side({tier: Float8(1.0)})
        if self.key_bits != 8:
            book = Codebook(self.key_bits, self.norm_correction)
            key = Side({tier: book}, Rotate(width, "key"))
        turn = Rotate(width, "value") if self.rotate_values else Transform()
        value = Side({tier: Affine(self.value_bits, width, zero="float")}, turn)
        return LayerQuantizer(key, value, Uniform(tier))


@dataclass(frozen=True)
class TurboQuantPaper:
    """The paper's mean-square variant: codebooks on both sides behind one rotation for all layers.

    Centroids are those of the sphere's exact law. The paper draws the rotation once, at random, and
    stores every token, also while generating, with no 16-bit part. Its nominal half bits (32
    channels at one bit more, rotated apart) and its inner-product variant are not offered; no code
    of the authors' was found to compare with.
    """

    label: ClassVar[str] = "TurboQuant (paper)"
    paper: ClassVar[str] = "arXiv 2504.19874"
    needs: ClassVar[Needs] = Needs()

    bits: Literal[1, 2, 3, 4] = 3
    rotation: Literal["random", "hadamard"] = "random"
    norm_correction: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a negative seed, or another kind of value.
        """
        check_fields(self)
        if self.seed < 0:
            raise UserError(f"TurboQuant's seed can't be negative ({self.seed}).")

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """One codebook behind one rotation."""
        book: Codec = Codebook(self.bits, self.norm_correction, "sphere")
        key, value = (
            Side({self.bits: book}, Rotate(spec.head_dim, side, self.rotation, self.seed))
            for side in ("key", "value")
        )
        return LayerQuantizer(key, value, Uniform(self.bits))


METHODS: dict[str, KVQuantizer] = {
    "turboquant_k8v4": TurboQuant(8, 4, norm_correction=False),
    "turboquant_4bit_nc": TurboQuant(4, 4),
    "turboquant_k3v4_nc": TurboQuant(3, 4),
    "turboquant_3bit_nc": TurboQuant(3, 3),
    "turboquant_paper": TurboQuantPaper(),
}
