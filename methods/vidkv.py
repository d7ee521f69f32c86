"""VidKV: keys at 2 and 1 bits by channel, ternary values, per channel (arXiv 2503.16257)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.cache import (
    Affine,
    Calibration,
    Codec,
    KVQuantizer,
    LayerQuantizer,
    LayerSpec,
    Needs,
    Packed,
    Plan,
    Residual,
    Side,
    Tokens,
    Transform,
    Uniform,
    check_fields,
    check_packable,
    filled,
    pack,
    unpack,
)
from kvbench.errors import UserError

Compat = Literal["fixed", "as_shipped"]
_HALF_MAX = 65504.0


def _mean_size(blocks: Tensor) -> Tensor:
    """(..., G, C) to its mean |x| (..., 1, C), as float16 keeps it."""
    return blocks.abs().mean(-2, keepdim=True).clamp_max(_HALF_MAX).half()


@dataclass(frozen=True)
class MixedChannels:
    """The first `high` channels at 2 bits, the others' Fourier coefficients at 1, along tokens.

    The transform runs over the low channels of a token. "fixed": the real one, whose coefficients
    are as many as the channels, each ±s with the group's mean |x|. "as_shipped": real and imaginary
    parts of the complex one, twice as many, decoded to 0 or s as the released code does.
    """

    group: int
    high: int
    compat: Compat = "fixed"
    fourier: bool = True
    bits: int = 1

    @property
    def block(self) -> int:
        """Tokens encoded together."""
        return self.group

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""
        if self.high >= channels:
            raise UserError(
                f"VidKV keeps {self.high} of {channels} channels at 2 bits and has none left for "
                "1 bit; lower key_bits."
            )
        check_packable(2, self.high)
        check_packable(1, self._rows(channels - self.high))

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes and metadata of both kinds of channel."""
        low = self._spectrum(x[..., self.high :].float()).unflatten(2, (-1, self.group))
        codes = pack((low >= 0).to(torch.uint8), 1)
        return *self._grid.encode(x[..., : self.high]), codes, _mean_size(low).squeeze(-2)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and metadata to (B, H, n, C)."""
        *high, codes, scale = packed
        signs = unpack(codes, 1).float()
        signs = signs if self.compat == "as_shipped" else 2 * signs - 1
        low = self._numbers((signs * scale.float().unsqueeze(-2)).flatten(2, 3))
        return torch.cat((self._grid.decode(tuple(high), torch.float32), low), -1).to(dtype)

    def bits_per_element(self, channels: int) -> float:
        """2 + 32 / group of the high channels; 1 + 16 / group of each coefficient of the low."""
        rows = self._rows(channels - self.high)
        total = self.high * (2 + 32 / self.group) + rows * (1 + 16 / self.group)
        return total / channels

    @property
    def _grid(self) -> Affine:
        return Affine(2, self.group, along="tokens", zero="float")

    def _rows(self, low: int) -> int:
        return 2 * low if self.fourier and self.compat == "as_shipped" else low

    def _spectrum(self, x: Tensor) -> Tensor:
        if not self.fourier:
            return x
        if self.compat == "as_shipped":
            return torch.view_as_real(torch.fft.fft(x, norm="ortho")).flatten(-2)
        half = torch.fft.rfft(x, norm="ortho")
        # The first imaginary part is zero, and of an even number of channels also the last.
        return torch.cat((half.real, half.imag[..., 1 : (x.shape[-1] + 1) // 2]), -1)

    def _numbers(self, rows: Tensor) -> Tensor:
        """The inverse of `_spectrum`."""
        if not self.fourier:
            return rows
        if self.compat == "as_shipped":
            pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)))
            return torch.fft.ifft(pairs, norm="ortho").real
        width = rows.shape[-1]
        real, imaginary = rows.split((width // 2 + 1, (width - 1) // 2), -1)
        imaginary = pad(imaginary, (1, width // 2 - (width - 1) // 2))
        return torch.fft.irfft(torch.complex(real, imaginary), n=width, norm="ortho")


@dataclass(frozen=True)
class Ternary:
    """Per channel along tokens: −1, 0 or 1 by the threshold `threshold` · mean |x| of the group.

    "fixed": times the group's mean |x|, five codes in a byte. "as_shipped": the scale is stored and
    not used, as in the released code, and codes take 2 bits as in its kernels.
    """

    group: int
    threshold: float
    compat: Compat = "fixed"
    bits: int = 2

    @property
    def block(self) -> int:
        """Tokens encoded together."""
        return self.group

    def check(self, channels: int) -> None:
        """Raise UserError when vectors of `channels` numbers can't be stored."""
        if self.compat == "as_shipped":
            check_packable(2, channels)

    def encode(self, x: Tensor) -> Packed:
        """(B, H, n, C) to codes (B, H, n / group, bytes) and scales (B, H, n / group, C)."""
        blocks = x.float().unflatten(2, (-1, self.group))
        scale = _mean_size(blocks)
        beyond = blocks.abs() > self.threshold * scale.float()
        codes = (torch.where(beyond, blocks.sign(), 0.0) + 1).to(torch.uint8)
        packed = pack(codes, 2) if self.compat == "as_shipped" else pack_fives(codes.flatten(3))
        return packed, scale.squeeze(-2)

    def decode(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """Codes and scales to (B, H, n, C)."""
        codes, scale = packed
        if self.compat == "as_shipped":
            return (unpack(codes, 2).float() - 1).flatten(2, 3).to(dtype)
        count = self.group * scale.shape[-1]
        steps = unpack_fives(codes, count).unflatten(-1, (self.group, -1)).float() - 1
        return (steps * scale.float().unsqueeze(-2)).flatten(2, 3).to(dtype)

    def bits_per_element(self, channels: int) -> float:
        """2 or just over 1.6 bits a code, and 16 of scale for each group."""
        codes = self.group * channels
        payload = 2.0 if self.compat == "as_shipped" else 8 * -(-codes // 5) / codes
        return payload + 16 / self.group


def pack_fives(codes: Tensor) -> Tensor:
    """(..., n) uint8 codes below 3 to (..., ⌈n / 5⌉) bytes, the first code the smallest place."""
    fives = pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5)).int()
    return (fives * _powers(codes.device)).sum(-1).to(torch.uint8)


def unpack_fives(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of what `pack_fives` gave."""
    fives = torch.div(packed[..., None].int(), _powers(packed.device), rounding_mode="floor") % 3
    return fives.flatten(-2)[..., :count]


def _powers(device: torch.device) -> Tensor:
    return 3 ** torch.arange(5, device=device, dtype=torch.int32)


class WideFirst(Transform):
    """Channels in the order of their range over a row's prompt and its heads, widest first."""

    def __init__(self, order: Tensor | None = None) -> None:
        """The order of each row, (B, D) int16, once it is known."""
        self._order = order

    def fit(self, states: Tensor, tokens: Tokens) -> Transform:
        """The order of these rows; padding has no say."""
        real = tokens.valid.to(states.device)[:, None, :, None]
        high = states.masked_fill(~real, -torch.inf).amax((1, 2))
        low = states.masked_fill(~real, torch.inf).amin((1, 2))
        return WideFirst((high - low).argsort(dim=-1, descending=True, stable=True).to(torch.int16))

    def store(self, x: Tensor) -> Tensor:
        """(B, H, n, D) in that order."""
        if self._order is None:
            return x
        return x.gather(-1, self._order.to(x.device).long()[:, None, None].expand_as(x))

    def attend(self, x: Tensor) -> Tensor:
        """Queries (B, Hq, n, D) in the same order: their products with keys stay what they were."""
        return self.store(x)

    def select(self, rows: Tensor) -> Transform:
        """Keep rows by index."""
        return self if self._order is None else WideFirst(self._order[rows.to(self._order.device)])

    def row_nbytes(self) -> int:
        """Two bytes a channel."""
        return 0 if self._order is None else self._order[0].nbytes


@dataclass(frozen=True)
class SalientVision:
    """Vision tokens whose stream points where the text's does get tier 2, all others tier 1.

    Of a row's N vision tokens that leave the window at once, the multiple of `group` in `share` · N
    with the largest mean dot product with its text tokens.
    """

    share: float
    group: int
    compat: Compat

    def prompt(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        tiers = filled(tokens, 1)
        if tokens.residual is None or tokens.is_vision is None:
            return tiers
        for row, stream in enumerate(tokens.residual.detach().float()):
            valid = tokens.valid[row]
            vision, text = valid & tokens.is_vision[row], valid & ~tokens.is_vision[row]
            held = int(valid.sum()) // self.group * self.group
            places = (vision & (valid.cumsum(0) <= held)).nonzero()[:, 0]
            count = self._count(len(places))
            if count and bool(text.any()):
                mean = stream[text.to(stream.device)].mean(0)
                scores = stream[places.to(stream.device)] @ mean
                order = scores.argsort(dim=0, descending=True, stable=True)
                tiers[row, places[order[:count].cpu()]] = 2
        return tiers

    def generated(self, tokens: Tokens) -> Tensor:
        """(B, n) int8."""
        return filled(tokens, 1)

    def _count(self, vision: int) -> int:
        count = int(vision * self.share) // self.group * self.group
        if self.compat == "as_shipped":
            count = max(count, self.group) - self.group  # the code drops the last of them
        return min(count, vision // self.group * self.group)


@dataclass(frozen=True)
class VidKV:
    """Per-channel groups of tokens on both sides; the end of the prompt and new tokens exact.

    Keys (after RoPE): `key_bits` − 1 of the channels, those with the widest range in the prompt,
    have 2 bits, the others 1 after a Fourier transform over them. Values: ternary; with `salient`
    > 0, that share of the vision tokens has 2 bits (the paper's STP: 0.2). `length mod group_size`
    prompt tokens stay exact, then up to `residual` tokens until they are packed together.

    `compat="fixed"` repairs what the released code loses: the sign of 1-bit numbers and the scale
    of ternary ones; it needs 1.6 bits for them and half of the coefficients. "as_shipped" keeps
    these defects, its 2-bit packing and its threshold of 0.5 (the paper has 0.7).

    Deviations in both: codes are written once, where the code decodes and quantizes everything
    again at each flush; the channel order is a row's own and frozen after the prompt; STP compares
    the stream entering each layer, which is the paper's projected embeddings in the first one only,
    counts whole groups, and then keys, too, are grouped among tokens of equal precision; the
    nominal 1.5 and 1.58 bits leave metadata out, `bits` here count all.
    """

    label: ClassVar[str] = "VidKV"
    paper: ClassVar[str] = "arXiv 2503.16257"
    size_knobs: ClassVar[dict[str, tuple[Any, ...]]] = {
        "key_bits": (1.25, 1.5, 1.75),
        "group_size": (8, 16, 32, 64),
        "salient": (0.0, 0.2),
    }

    key_bits: float = 1.5
    group_size: int = 32
    residual: int = 128
    salient: float = 0.0
    fourier: bool = True
    compat: Compat = "fixed"

    @property
    def needs(self) -> Needs:
        """Modality and the residual stream, for salient tokens."""
        return Needs(modality=self.salient > 0, residual=self.salient > 0)

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: bits outside [1, 2), a share outside [0, 1], or groups that straddle a flush.
        """
        check_fields(self)
        if not 1 <= self.key_bits < 2:
            raise UserError(f"VidKV's key_bits must lie in [1, 2), not {self.key_bits}.")
        if not 0 <= self.salient <= 1:
            raise UserError(f"VidKV's salient share must lie in [0, 1], not {self.salient}.")
        if self.group_size < 1 or self.residual < 1 or self.residual % self.group_size:
            raise UserError(
                f"VidKV's residual ({self.residual}) must be a multiple of its group size "
                f"({self.group_size})."
            )

    def layer(self, spec: LayerSpec, calibration: Calibration | None) -> LayerQuantizer:
        """Mixed channels behind an order, ternary values."""
        # The released code takes 32 channels where the share rounds to none.
        high = int((self.key_bits - 1) * spec.head_dim) or min(32, spec.head_dim // 2)
        window = Residual(self.residual, prompt_block=self.group_size)
        key: Codec = MixedChannels(self.group_size, high, self.compat, self.fourier)
        ternary = Ternary(self.group_size, 0.5 if self.compat == "as_shipped" else 0.7, self.compat)
        keys: dict[int, Codec] = {1: key}
        values: dict[int, Codec] = {1: ternary}
        plan: Plan = Uniform(1)
        if self.salient:
            keys[2] = key
            values[2] = Affine(2, self.group_size, along="tokens", zero="float")
            plan = SalientVision(self.salient, self.group_size, self.compat)
        return LayerQuantizer(Side(keys, WideFirst(), window), Side(values, window=window), plan)


METHODS: dict[str, KVQuantizer] = {
    "vidkv": VidKV(),
    "vidkv_as_shipped": VidKV(compat="as_shipped"),
}
