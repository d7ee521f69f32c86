"""Group quantization inside a Triton kernel: the numbers of `kvbench.cache.codecs.Affine`.

Every function takes float32 blocks of any shape; metadata must broadcast against the numbers.
Launch kernels that call them with `enable_fp_fusion=False`: a product and a sum fused into one
rounding may move a number across a tie. ZERO is "int", "float" or "symmetric".
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 · 2^23: added to a number within 2^22 of zero, it leaves no place for a fraction."""
_HALF_MAX: tl.constexpr = tl.constexpr(65504.0)
_HALF_TINY: tl.constexpr = tl.constexpr(2.0**-24)
_LARGEST: tl.constexpr = tl.constexpr(2.0**100)


@triton.jit
def quantize_rows(
    x: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    CLIP: tl.constexpr,
    MIDPOINT: tl.constexpr,
) -> tl.tuple:
    """(ROWS, CHANNELS) float32 in groups of GROUP neighbours, all powers of two, to three blocks.

    Packed codes (ROWS, CHANNELS · BITS / 8) uint8, as `kvbench.kernels.packing` lays them out;
    scale and zero (ROWS, CHANNELS / GROUP) float32, as `metadata` gives them.
    """
    grouped = tl.reshape(bounded(x), (ROWS, CHANNELS // GROUP, GROUP))
    scale, zero = metadata(tl.min(grouped, 2), tl.max(grouped, 2), BITS, ZERO, CLIP, MIDPOINT)
    codes = encode(grouped, scale[:, :, None], zero[:, :, None], BITS, ZERO)
    planes = tl.reshape(codes, (ROWS, 8 // BITS, CHANNELS * BITS // 8))
    places = (tl.arange(0, 8 // BITS) * BITS)[None, :, None]
    return tl.sum(planes << places, 1).to(tl.uint8), scale, zero


@triton.jit
def metadata(
    low: tl.tensor,
    high: tl.tensor,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    CLIP: tl.constexpr,
    MIDPOINT: tl.constexpr,
) -> tl.tuple:
    """Scale and zero of groups from their smallest and largest number, both float32.

    Already rounded to what is stored, a float16 scale and a float16 or int16 zero: cast them on
    storing. The zero of "symmetric" is a zero that nothing stores.
    """
    if ZERO == "symmetric":
        largest = tl.maximum(tl.maximum(tl.abs(low), tl.abs(high)), 1e-5) * CLIP
        scale = _half(tl.maximum(_over(largest, max(2 ** (BITS - 1) - 1, 1)), _HALF_TINY))
        return scale, tl.zeros_like(scale)
    middle = _half(low * 0.5 + high * 0.5)
    if CLIP != 1.0:
        if MIDPOINT:
            center, reach = low * 0.5 + high * 0.5, (high * 0.5 - low * 0.5) * CLIP
            low, high = center - reach, center + reach
        else:
            low, high = low * CLIP, high * CLIP
    scale = _half(_over(high - low, 2**BITS - 1))
    constant = scale == 0.0
    if ZERO == "float":
        return tl.where(constant, 1.0, scale), tl.where(constant, middle, _half(low))
    # A narrower group far from zero gets wider steps, so that its zero fits int16. A constant v is
    # scale |v|, zero point -sign(v), code 0.
    scale = _half(tl.maximum(scale, _over(tl.abs(low), 32000)))
    size = tl.abs(middle)
    scale = tl.where(constant, tl.where(size == 0.0, 1.0, size), scale)
    steps = tl.maximum(tl.minimum(-quotient(low, scale), 40000.0), -40000.0)
    zero = tl.maximum(tl.minimum(round_half_even(steps), 32767.0), -32768.0)
    sign = tl.where(middle > 0.0, 1.0, 0.0) - tl.where(middle < 0.0, 1.0, 0.0)
    return scale, tl.where(constant, -sign, zero)


@triton.jit
def encode(
    x: tl.tensor, scale: tl.tensor, zero: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr
) -> tl.tensor:
    """Bounded numbers to int32 codes below 2**BITS; metadata as `metadata` gives them."""
    return shifted_codes(x, scale, zero, BITS, ZERO) - code_shift(zero, BITS, ZERO)


@triton.jit
def shifted_codes(
    x: tl.tensor, scale: tl.tensor, zero: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr
) -> tl.tensor:
    """Codes plus `code_shift`, which is the same for a group: bytes can lose it all at once."""
    steps = quotient(x - zero if ZERO == "float" else x, scale) + _MAGIC
    first = _first_step(zero, BITS, ZERO) + _MAGIC
    steps = tl.maximum(tl.minimum(steps, first + (2.0**BITS - 1)), first)
    return steps.to(tl.int32, bitcast=True)


@triton.jit
def code_shift(zero: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr) -> tl.tensor:
    """What `shifted_codes` adds to codes, int32 in the shape of the metadata."""
    return (_first_step(zero, BITS, ZERO) + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def _first_step(zero: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr) -> tl.tensor:
    """The rounded quotient whose code is 0."""
    if ZERO == "int":
        return -zero
    if ZERO == "float":
        return tl.zeros_like(zero)
    return zero - 2.0 ** (BITS - 1)


@triton.jit
def decode(
    codes: tl.tensor, scale: tl.tensor, zero: tl.tensor, BITS: tl.constexpr, ZERO: tl.constexpr
) -> tl.tensor:
    """Codes of any integer dtype back to float32 numbers."""
    steps = codes.to(tl.float32)
    if ZERO == "float":
        return steps * scale + zero
    if ZERO == "int":
        return (steps - zero) * scale
    return (steps - 2.0 ** (BITS - 1)) * scale


@triton.jit
def bounded(x: tl.tensor) -> tl.tensor:
    """Float32 numbers held to where no quotient by a scale overflows; no code changes by that."""
    return tl.maximum(tl.minimum(x, _LARGEST), -_LARGEST)


@triton.jit
def quotient(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The quotient of bounded numbers and a scale that float16 can hold, rounded once to float32.

    The remainder of a product with the reciprocal has no rounding error, and no quotient of such
    numbers comes near enough to the middle of two floats for the reciprocal's error to matter,
    even where the GPU's is two units off.
    """
    inverse = 1.0 / scale
    guess = x * inverse
    return tl.fma(tl.fma(guess, -scale, x), inverse, guess)


@triton.jit
def round_half_even(x: tl.tensor) -> tl.tensor:
    """Whole float32 numbers next to numbers within 2^22 of zero, ties to the even one."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def _over(x: tl.tensor, NUMBER: tl.constexpr) -> tl.tensor:
    """`quotient` by a small whole number."""
    guess = x * (1.0 / NUMBER)
    rest = tl.fma(guess, tl.zeros_like(x) - NUMBER, x)
    return tl.fma(rest, tl.zeros_like(x) + 1.0 / NUMBER, guess)


@triton.jit
def _half(x: tl.tensor) -> tl.tensor:
    """Float32 numbers that float16 can hold."""
    return tl.maximum(tl.minimum(x, _HALF_MAX), -_HALF_MAX).to(tl.float16).to(tl.float32)
