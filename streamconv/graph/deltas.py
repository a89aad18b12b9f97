"""Numbers of several models' tensors: products added as a fused multiply-add does, deltas to a base, and which of them are picked.

They are float32 (float64 of float64), rounded to the tensors' dtype where mergekit's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from streamconv.graph import casts
from streamconv.graph.casts import narrow, widen
from streamconv.graph.moves import Move

Array = np.ndarray[Any, Any]


def pieces_of(region: Move, *arrays: Array) -> Iterator[tuple[Move, tuple[Array, ...]]]:
    """A region, and arrays in its shape, in the same pieces of at most `casts.PIECE` elements."""
    if not region.sizes:  # numpy makes scalars, that nothing can be written to, of arrays without dimensions
        region = replace(region, sizes=(1,), src_strides=(1,), dst_strides=(1,))
        arrays = tuple(array.reshape(1) for array in arrays)
    if region.numel <= casts.PIECE:
        yield region, arrays
        return
    spans = [(n - 1) * stride for n, stride in zip(region.sizes, region.src_strides, strict=True)]
    axis = spans.index(max(spans))
    size = region.sizes[axis]
    for start, stop in ((0, size // 2), (size // 2, size)):
        sizes = (*region.sizes[:axis], stop - start, *region.sizes[axis + 1 :])
        part = replace(region, sizes=sizes, src=region.src + start * region.src_strides[axis])
        yield from pieces_of(part, *(array[(slice(None),) * axis + (slice(start, stop),)] for array in arrays))


def places_of(region: Move) -> Array:
    """The place of each element of a region in its tensor."""
    places = np.full((1,) * len(region.sizes), region.src, np.int64)
    for axis, (size, stride) in enumerate(zip(region.sizes, region.src_strides, strict=True)):
        steps = np.arange(size, dtype=np.int64) * stride
        places = places + steps.reshape((size,) + (1,) * (len(region.sizes) - 1 - axis))
    return places


def chances_of(places: Array, key: int) -> Array:
    """A number below `CHANCES` for each place, by a key: the first bits of SplitMix64's."""
    state = places.astype(np.uint64)
    state *= np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(key)
    other = np.empty_like(state)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 0)):
        np.right_shift(state, np.uint64(shift), out=other)
        np.bitwise_xor(state, other, out=state)
        if factor:
            state *= np.uint64(factor)
    state >>= np.uint64(11)
    return state


def weighted_sum(operands: Sequence[Array], weights: Sequence[float], dtype: str) -> Array:
    """A piece of each operand times its weight, added up as a fused multiply-add does: products are not rounded."""
    total: Array | None = None
    for operand, weight in zip(operands, weights, strict=True):
        values = widen(operand, dtype)
        factor = values.dtype.type(weight)
        if total is None:
            total = np.multiply(values, factor)
            np.add(total, total.dtype.type(0), out=total)  # of -0
        elif values.dtype == np.float64 or _bits(float(factor)) + _BITS[dtype] <= _BITS["float32"]:
            np.add(total, np.multiply(values, factor), out=total)
        else:  # exact in float64, and added there
            product = np.multiply(values, np.float64(factor))
            np.add(product, total, out=product)
            np.copyto(total, product, casting="unsafe")
    assert total is not None
    return total


_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
"""Bits of a number, less sign and exponent."""


def _bits(number: float) -> int:
    """How many bits of a number, less sign and exponent, there are from the first to the last that is not 0."""
    whole = int(math.ldexp(abs(math.frexp(number)[0]), 53))
    return (whole // (whole & -whole)).bit_length() if whole else 0


def delta_of(tensor: Array, base: Array, dtype: str) -> tuple[Array, Array]:
    """A tensor's numbers less those of a base, rounded to its dtype; and the bits of their magnitudes."""
    delta = np.subtract(widen(tensor, dtype), base)
    items = round_in_place(delta, dtype)
    sign = items.dtype.type(1 << 8 * items.itemsize - 1)
    bits: Array = items & ~sign
    return delta, bits


def round_in_place(values: Array, dtype: str) -> Array:
    """Rounds numbers to a dtype where they are; gives them as items of it, too."""
    if values.dtype == np.dtype(np.float64) or dtype == "float32":
        return values.view(f"u{values.itemsize}")
    items = np.empty(values.shape, np.uint16)
    narrow(values, items, dtype)
    np.copyto(values, widen(items, dtype))
    return items


def rounded(number: Any, dtype: str) -> Any:
    """A number rounded to a dtype."""
    wide = np.array([number], np.float64 if dtype == "float64" else np.float32)
    round_in_place(wide, dtype)
    return wide[0]
