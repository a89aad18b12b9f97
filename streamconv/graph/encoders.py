"""Weights as codes and scales by rounding alone, with the arithmetic of the libraries that define how.

What compressed-tensors computes in the weight's own dtype is computed in float32 here and rounded to that dtype after each step, which
comes to the same: sums, products and quotients of two narrower floats are exact enough in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from streamconv.graph.arrays import numpy_dtype
from streamconv.graph.codes import E2M1

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]
    Round = Callable[[Array], Array]

_E4M3 = 448.0  # the largest of float8_e4m3fn
_E2M1 = 6.0  # the largest of float4_e2m1fn
_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Between two values of float4_e2m1fn what lies in the middle, and whether that goes up."""
_SMALLEST_SCALE = 0.125  # what a scale of NVFP4 that is 0 becomes


_FNUZ = np.arange(256, dtype=np.uint8)  # for each code of float8_e4m3fn
_FNUZ[0x80], _FNUZ[[0x7F, 0xFF]] = 0, 0x80

_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7}  # bits
_SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}  # of normal numbers


def rounding(dtype: str) -> Round:
    """Rounds float32 to a type, widened again."""
    if dtype == "float32":
        return lambda values: values
    narrow = numpy_dtype(dtype)

    def rounded(values: Array) -> Array:
        result: Array = values.astype(narrow).astype(np.float32)
        return result

    return rounded


def blocks_of(values: Array, block: tuple[int, int]) -> Array:
    """A matrix in blocks, as (down, rows, across, columns), with zeros where it ends within one."""
    down, across = (-(-size // step) for size, step in zip(values.shape, block, strict=True))
    missing = down * block[0] - values.shape[0], across * block[1] - values.shape[1]
    if any(missing):
        values = np.pad(values, ((0, missing[0]), (0, missing[1])))
    return values.reshape(down, block[0], across, block[1])


def matrix_of(blocks: Array, shape: tuple[int, int]) -> Array:
    """What `blocks_of` has taken apart."""
    down, rows, across, columns = blocks.shape
    return blocks.reshape(down * rows, across * columns)[: shape[0], : shape[1]]


def largest(blocks: Array) -> Array:
    """The largest magnitude of each block; NaN where one is."""
    magnitudes: Array = np.maximum(np.maximum(blocks.max((1, 3)), -blocks.min((1, 3))), np.float32(0))
    return magnitudes


def spread(shared: Array) -> Array:
    """What blocks share, as it goes with their elements."""
    return shared[:, None, :, None]


def widened(items: Array, dtype: str) -> Array:
    """The numbers of a type as float32, in memory of their own, which encoders compute in."""
    if dtype == "bfloat16":
        words = items.astype(np.uint32)
        np.left_shift(words, 16, out=words)
        return words.view("f4")
    numbers: Array = items.view(numpy_dtype(dtype)).astype(np.float32)
    return numbers


@dataclass(frozen=True)
class Encoded:
    """Blocks as codes, a byte each, and what each of them shares, as it is stored.

    Attributes:
        codes: by block.
        scales: one for each.
        unscaled: whether a block has no scale, for NaN or infinity in it, or numbers too small for one.
        zeros: zero points, where there are any.
    """

    codes: Array
    scales: Array
    unscaled: Array
    zeros: Array | None = None


def fp8(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
    """float8_e4m3fn times a float32, as transformers' `Fp8Quantize`: all in float32, quotients by way of reciprocals."""
    most = largest(blocks)
    factors = np.reciprocal(most) * np.float32(_E4M3)
    factors[(most == 0) | np.isnan(most)] = 1
    codes = _to_e4m3(np.multiply(blocks, spread(factors), out=blocks))
    return Encoded(codes, np.reciprocal(factors).view(np.uint32), ~np.isfinite(most) | np.isinf(factors))


def fp8_fnuz(blocks: Array, dtype: str, whole: float) -> Encoded:
    """`fp8` as float8_e4m3fnuz: the same bits, which stand for half as much, and twice the scales."""
    encoded = fp8(blocks, dtype, whole)
    scales = encoded.scales.view(np.float32) * np.float32(2)
    return Encoded(to_fnuz(encoded.codes), scales.view(np.uint32), encoded.unscaled)


def to_fnuz(codes: Array) -> Array:
    """Codes of float8_e4m3fn as those of float8_e4m3fnuz that stand for half as much; it has no -0, and one NaN, whose code that is."""
    return np.take(_FNUZ, codes)


def float8(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
    """float8_e4m3fn times a scale of the weight's dtype."""
    scales = _not_zero(rounding(dtype)(largest(blocks) / np.float32(_E4M3)), dtype)
    codes = _finish(np.divide(blocks, spread(scales), out=blocks), dtype, _to_e4m3)
    return Encoded(codes, _stored(scales, dtype), ~np.isfinite(scales))


def powers(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
    """float8_e4m3fn times a power of two as float32, the least with which all fit: exact for few bits that lie near each other."""
    most = largest(blocks)
    fraction, exponent = np.frexp(most / np.float32(_E4M3))
    scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
    scales[most == 0] = 1
    return Encoded(_to_e4m3(np.divide(blocks, spread(scales), out=blocks)), scales.view(np.uint32), ~np.isfinite(most))


def powers_as_weights(blocks: Array, dtype: str, whole: float) -> Encoded:
    """`powers`, with scales in the weight's dtype."""
    made = powers(blocks, dtype, whole)
    return Encoded(made.codes, _stored(made.scales.view(np.float32), dtype), made.unscaled)


def integers(bits: int) -> Callable[[Array, str, float], Encoded]:
    """Signed integers of so many bits times a scale of the weight's dtype."""
    half = 1 << bits - 1

    def encode(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
        scales = _not_zero(rounding(dtype)(largest(blocks) / np.float32(half - 0.5)), dtype)
        codes = _finish(np.divide(blocks, spread(scales), out=blocks), dtype, _TO_INTEGERS[bits])
        return Encoded(codes, _stored(scales, dtype), ~np.isfinite(scales))

    return encode


def asymmetric(bits: int) -> Callable[[Array, str, float], Encoded]:
    """Signed integers less a zero point, times a scale of the weight's dtype."""
    half = 1 << bits - 1

    def encode(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
        rounded = rounding(dtype)
        low = np.minimum(blocks.min((1, 3)), np.float32(0))
        high = np.maximum(blocks.max((1, 3)), np.float32(0))
        scales = rounded(rounded(high - low) / np.float32(2 * half - 1))
        zeros = np.clip(rounded(np.float32(-half) - rounded(low / scales)), -half, half - 1)
        zeros = np.rint(np.nan_to_num(zeros, nan=0.0))
        scales = _not_zero(scales, dtype)
        values = rounded(np.divide(blocks, spread(scales), out=blocks))
        codes = _finish(np.add(values, spread(zeros), out=values), dtype, _TO_INTEGERS[bits])
        return Encoded(codes, _stored(scales, dtype), ~np.isfinite(scales), zeros.astype(np.int8).view(np.uint8))

    return encode


def nvfp4(blocks: Array, dtype: str, whole: float) -> Encoded:
    """float4_e2m1fn times a float8_e4m3fn less the scale of all of these, ``whole``."""
    shared = np.float32(whole)
    most = largest(blocks)
    scales = _to_e4m3(shared * rounding(dtype)(most / np.float32(_E2M1))).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales[scales == 0] = _SMALLEST_SCALE
    return Encoded(_to_e2m1(np.divide(blocks, spread(scales / shared), out=blocks)), _to_e4m3(scales), ~np.isfinite(most))


def shared_scale(most: float, dtype: str) -> float:
    """The scale of all scales of NVFP4, for weights with that largest magnitude."""
    rounded = rounding(dtype)
    most = max(most, _SMALLEST[dtype])
    reciprocal = rounded(np.reciprocal(np.array([most], np.float32)))
    scale = float(rounded(reciprocal * np.float32(_E4M3 * _E2M1))[0])
    return scale if math.isfinite(scale) else 1.0


def mxfp4(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
    """float4_e2m1fn times a power of two, its exponent in a byte."""
    most = largest(blocks)
    octets, powers = _exponents(most, dtype, 2)
    return Encoded(_finish(np.divide(blocks, spread(powers), out=blocks), dtype, _to_e2m1), octets, ~np.isfinite(most))


def mxfp8(blocks: Array, dtype: str, whole: float) -> Encoded:  # noqa: ARG001
    """float8_e4m3fn times a power of two, its exponent in a byte."""
    most = largest(blocks)
    octets, powers = _exponents(most, dtype, 8)
    return Encoded(_finish(np.divide(blocks, spread(powers), out=blocks), dtype, _to_e4m3), octets, ~np.isfinite(most))


ENCODERS: dict[str, Callable[[Array, str, float], Encoded]] = {
    "fp8": fp8,
    "fp8_powers": powers,
    "fp8_fnuz": fp8_fnuz,
    "float8": float8,
    "float8_powers": powers_as_weights,
    "int8": integers(8),
    "int4": integers(4),
    "int4_asymmetric": asymmetric(4),
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "mxfp8": mxfp8,
}
"""What makes codes and scales of blocks, their dtype, and what all scales share."""


def numbers_of(made: Encoded, rule: str, dtype: str, whole: float) -> Array:
    """What codes and scales that a rule has made of blocks of a dtype stand for, as its library reads them, as float32."""
    scales = made.scales
    rule = rule.removesuffix("_powers")
    if rule in {"fp8", "fp8_fnuz"}:
        kind = ml_dtypes.float8_e4m3fn if rule == "fp8" else ml_dtypes.float8_e4m3fnuz
        return rounding(dtype)(made.codes.view(kind).astype(np.float32) * spread(scales.view(np.float32)))
    if rule in {"mxfp4", "mxfp8"}:
        factors, through = np.ldexp(np.float32(1), scales.astype(np.int32) - 127), "bfloat16"
    elif rule == "nvfp4":
        factors, through = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) / np.float32(whole), "bfloat16"
    else:
        factors, through = scales.view(numpy_dtype(dtype)).astype(np.float32), dtype
    if rule in {"nvfp4", "mxfp4"}:
        values = np.take(np.array(E2M1, np.float32), made.codes)
    elif rule in {"float8", "mxfp8"}:
        values = made.codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        values = made.codes.view(np.int8).astype(np.float32)
        values = values - spread(made.zeros.view(np.int8)) if made.zeros is not None else values
    return rounding(through)(values * spread(factors))


def pack(codes: Array, bits: int, axis: int) -> Array:
    """Signed integers of 4 or 8 bits as words, plus half of their range, the first in the lowest bits; zeros where a word ends later."""
    per = 32 // bits
    numbers = (codes + np.uint8(1 << bits - 1)) & np.uint8((1 << bits) - 1)
    numbers = np.moveaxis(numbers, axis, -1)
    if missing := -numbers.shape[-1] % per:
        numbers = np.pad(numbers, ((0, 0), (0, missing)))
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per), np.uint32)
    for number in range(per):
        words |= numbers[:, number::per].astype(np.uint32) << np.uint32(bits * number)
    return np.moveaxis(words, -1, axis)


def pack_pairs(codes: Array) -> Array:
    """Codes of four bits, two in a byte, the first in the low ones."""
    pairs: Array = codes[:, ::2] | codes[:, 1::2] << 4
    return pairs


def _not_zero(scales: Array, dtype: str) -> Array:
    scales[scales == 0] = 2.0 ** -_MANTISSA[dtype]  # the distance from 1 to the next number
    return scales


def _stored(scales: Array, dtype: str) -> Array:
    """Scales as the items of a type that holds them."""
    narrow = scales.astype(numpy_dtype(dtype))
    return narrow.view(f"u{narrow.itemsize}")


def _finish(quotients: Array, dtype: str, encode: Callable[[Array], Array]) -> Array:
    """Quotients rounded to a type, as codes: those of 16 bits are looked up."""
    if dtype == "float32":
        return encode(quotients)
    numbers = quotients.astype(numpy_dtype(dtype)).view(np.uint16)
    return np.take(_codes_of(dtype, encode), numbers, mode="clip")


@cache
def _codes_of(dtype: str, encode: Callable[[Array], Array]) -> Array:
    """The code of each number of 16 bits."""
    with np.errstate(all="ignore"):
        return encode(np.arange(1 << 16, dtype=np.uint16).view(numpy_dtype(dtype)).astype(np.float32))


def _to_e4m3(values: Array) -> Array:
    codes: Array = np.clip(values, -_E4M3, _E4M3, out=values).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


def _to_integers(bits: int, values: Array) -> Array:
    """Whole numbers of so many bits, as signed bytes; NaN is 0."""
    half = 1 << bits - 1
    codes: Array = np.nan_to_num(np.rint(np.clip(values, -half, half - 1)), nan=0.0).astype(np.int8).view(np.uint8)
    return codes


_TO_INTEGERS = {bits: partial(_to_integers, bits) for bits in (4, 8)}


def _to_e2m1(values: Array) -> Array:
    """Codes of float4_e2m1fn, ties to the even one; a negative number that is rounded to zero is -0, and -0 itself 0."""
    magnitudes = np.abs(values)
    codes = (values < 0).view(np.uint8) << 3
    for middle, goes_up in _TIES:
        codes += (magnitudes >= middle if goes_up else magnitudes > middle).view(np.uint8)
    return codes


def _exponents(most: Array, dtype: str, less: int) -> tuple[Array, Array]:
    """Powers of two near the largest magnitudes, as bytes of exponents, and as numbers: from 1.75 times one on the next one."""
    narrow = numpy_dtype(dtype)
    bits = most.astype(narrow).view(f"u{narrow.itemsize}")
    mantissa = _MANTISSA[dtype]
    bits = bits + bits.dtype.type(1 << mantissa - 2) & ~bits.dtype.type((1 << mantissa) - 1)
    powers = bits.view(narrow).astype(np.float32)
    exponents = np.where(powers == 0, 0, np.clip(127 + np.frexp(powers)[1] - 1 - less, 0, 255))
    scales = np.ldexp(np.float32(1), exponents - 127).astype(narrow).astype(np.float32)
    exponents[scales == 0] = 127
    scales[scales == 0] = 1
    return exponents.astype(np.uint8), scales
