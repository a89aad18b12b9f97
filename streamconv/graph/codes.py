"""Codes of quantized weights as numbers: integers out of words, small floats, what blocks share as wide as what shares it."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.graph import casts
from streamconv.graph.arrays import numpy_dtype

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

AWQ = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word each of its columns is, as AWQ's kernels want them."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1, *(-value for value in _E2M1))
"""What the codes of float4_e2m1fn stand for."""


def unpack(words: Array, bits: int, axis: int) -> Array:
    """Unsigned integers of ``bits`` bits as bytes: element i is bits [i * bits, (i + 1) * bits) of words that are one little-endian string.

    Args:
        words: unsigned integers, in three axes.
        bits: 1 to 8.
        axis: along which they are that string, 1 or 2; its length becomes as many as all bits hold.
    """
    octets = np.ascontiguousarray(words)[..., None].view(np.uint8)
    if axis == 1 and bits in {1, 2, 4, 8}:
        return _unpack_rows(octets, bits)
    text = np.moveaxis(octets, axis, -2)
    text = np.ascontiguousarray(text).reshape(*text.shape[:-2], -1)
    mask, per = (1 << bits) - 1, 8 // math.gcd(8, bits)  # elements that fill whole bytes
    width = per * bits // 8
    out = np.empty((*text.shape[:-1], text.shape[-1] * 8 // bits), np.uint8)
    for number in range(per):
        first, shift = divmod(number * bits, 8)
        target = out[..., number::per]
        low = text[..., first::width][..., : target.shape[-1]]
        if shift + bits > 8:
            high = text[..., first + 1 :: width][..., : target.shape[-1]]
            np.copyto(target, (low >> shift | high << (8 - shift)) & mask)
        else:
            np.copyto(target, low >> shift & mask)
    return np.moveaxis(out, -1, axis)


def _unpack_rows(octets: Array, bits: int) -> Array:
    """The same along rows, where whole integers fill bytes; the bytes of a word are the last axis."""
    count, words, columns, width = octets.shape
    per, mask = 8 // bits, (1 << bits) - 1
    out = np.empty((count, words, width * per, columns), np.uint8)
    for byte in range(width):
        for number in range(per):
            np.copyto(out[:, :, byte * per + number], octets[..., byte] >> bits * number & mask)
    return out.reshape(count, words * width * per, columns)


def look_up(octets: Array, values: tuple[float, ...], *, high_first: bool = False) -> Array:
    """What the two codes of four bits in each byte stand for, as float32 in scratch memory, side by side along the last axis."""
    return casts.look_up(octets, _pairs(values, high_first))


def look_up_integers(octets: Array, bits: int, offset: int) -> Array:
    """The same of two or four integers in each byte, the first in the lowest bits, less ``offset``."""
    return casts.look_up(octets, _integers(bits, offset))


@cache
def _pairs(values: tuple[float, ...], high_first: bool) -> Array:
    """For each byte both values of its codes, as one item."""
    octets = np.arange(256)
    first, second = octets & 15, octets >> 4
    if high_first:
        first, second = second, first
    listed = np.array(values, np.float32)
    return np.ascontiguousarray(np.stack([listed[first], listed[second]], -1)).view(np.uint64).reshape(-1)


@cache
def _integers(bits: int, offset: int) -> Array:
    """For each byte all its integers, less the offset, as one item."""
    shifts = np.arange(0, 8, bits)
    numbers = (np.arange(256)[:, None] >> shifts & (1 << bits) - 1) - offset
    return numbers.astype(np.float32).view({4: np.uint64, 2: np.complex128}[bits]).reshape(-1)


def multiply(values: Array, factors: Array, columns: range, count: int) -> Array:
    """Numbers, in place, times what each ``count`` of them along the last axis share: ``factors`` from the one of the first column on."""
    if count == 1 or factors.shape[2] == 1:
        return np.multiply(values, factors, out=values)
    if columns.step > 1:
        return np.multiply(values, spread(factors, 2, columns, count, columns.start // count), out=values)
    first = min(-columns.start % count, len(columns))  # what is left of a block before the first whole one
    last = first + (len(columns) - first) // count * count
    number = 0
    for start, stop, size in ((0, first, first), (first, last, count), (last, len(columns), len(columns) - last)):
        if start < stop:
            blocks = values[..., start:stop].reshape(*values.shape[:2], -1, size)  # a view of these
            following = number + blocks.shape[2]
            np.multiply(blocks, factors[..., number:following, None], out=blocks)
            number = following
    return values


def reorder_awq(nibbles: Array) -> Array:
    """Nibbles of words in the order of their columns."""
    return nibbles.reshape(*nibbles.shape[:-1], -1, 8)[..., AWQ].reshape(nibbles.shape)


@cache
def table(codes: str) -> Array:
    """The float32 that each code stands for, at its place."""
    if codes == "float6_e2m3fn":
        small = [m / 8 if m < 8 else (1 + m % 8 / 8) * 2.0 ** (m // 8 - 1) for m in range(32)]
        return np.array([*small, *(-value for value in small)], np.float32)
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(codes)).astype(np.float32)


def factors(scales: Array, dtype: str) -> Array:
    """Scales as float32. Bytes are exponents, as those of float8_e8m0fnu are, but 255 is infinite and no NaN."""
    if scales.itemsize == 1:
        return _factors(dtype)[scales.view(np.uint8)]
    return scales.view(numpy_dtype(dtype)).astype(np.float32)


@cache
def _factors(dtype: str) -> Array:
    """For each byte the scale that it is."""
    if dtype not in {"uint8", "float8_e8m0fnu"}:
        return table(dtype)
    powers = np.ldexp(np.float32(1), np.arange(256) - 127)
    powers[255] = np.inf if dtype == "uint8" else np.nan
    return powers


def largest(scales: Array) -> float:
    """The largest magnitude of some scales; infinite if one is NaN."""
    if not scales.size:
        return 0.0
    magnitude = max(float(scales.max()), -float(scales.min()))
    return math.inf if math.isnan(magnitude) else magnitude


def spread(values: Array, axis: int, elements: range, count: int = 1, first: int = 0) -> Array:
    """What each ``count`` elements along an axis share, for these elements: as it is, where there is one value for all of them.

    Args:
        values: those from the one with number ``first`` on.
        axis: 0 to 2.
        elements: the elements, in equal steps.
        count: how many share a value.
        first: the number of the first value.
    """
    if values.shape[axis] == 1:
        return values
    before = (slice(None),) * axis
    start = elements.start // count - first
    if elements.step > 1:
        numbers = np.arange(elements.start, elements.stop, elements.step) // count - first
        return np.take(values, numbers, axis)
    if count == 1:
        return values[(*before, slice(start, start + len(elements)))]
    wide = np.repeat(values[(*before, slice(start, None))], count, axis)
    skipped = elements.start % count
    return wide[(*before, slice(skipped, skipped + len(elements)))]


def round_to(values: Array, dtype: str) -> Array:
    """Float32 rounded to a narrower type and widened again."""
    if dtype == "float32":
        return values
    narrow: Array = values.astype(numpy_dtype(dtype)).astype(np.float32)
    return narrow
