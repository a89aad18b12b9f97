"""Numbers from one floating type to another, in the bits that torch makes of them, by passes of numpy over pieces that stay in the cache.

All of it goes by float32, as in torch: a float64 is rounded twice on its way to 16 bits. NaNs come out as the one quiet NaN. Whoever
evaluates has numpy not warn of them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streamconv.graph.arrays import numpy_dtype
from streamconv.graph.losses import Loss, measure

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

PIECE = 1 << 18  # elements: smaller pieces have threads wait for each other between the calls, larger ones leave the cache
SCRATCH = 16 * PIECE  # bytes that a thread takes for a piece: three times its elements as float32, and masks

_LARGEST = {
    "float64": sys.float_info.max, "float32": 2.0**128 - 2.0**104, "float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120,
    "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0,
}  # fmt: skip
_NAN = {"float64": 0x7FF8 << 48, "float32": 0x7FC0 << 16, "float16": 0x7E00, "bfloat16": 0x7FC0}
_NARROW = {"float16": (10, 15, 0x7C00), "float8_e5m2": (2, 15, 0x7C), "float8_e4m3fn": (3, 7, 0x7F)}
"""Bits of the mantissa, bias of the exponent, and the first bits, less the sign, of what is infinite or NaN."""


class _Scratch(threading.local):
    """Memory that a thread keeps for numbers on their way."""

    def __init__(self) -> None:
        self._words = np.empty((3, PIECE), np.float32)

    def __call__(self, number: int, like: Array) -> Array:
        """Room for the elements of a piece as float32, in its shape; there are three, one after the other."""
        return self._words[number:].reshape(-1)[: like.size].reshape(like.shape)

    def of(self, number: int, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """The same room for something else; of what is larger, other memory."""
        words, size = self._words[number].view(dtype), math.prod(shape)
        return words[:size].reshape(shape) if size <= words.size else np.empty(shape, dtype)


_scratch = _Scratch()


def pieces(*arrays: Array, times: int = 1) -> Iterator[tuple[Array, ...]]:
    """Arrays of one shape in the same pieces of at most ``times`` `PIECE` elements, each of which lies near together in all of them."""
    shape, most = arrays[0].shape, times * PIECE
    if arrays[0].size <= most:
        yield arrays
        return
    extents = [size * max(abs(array.strides[k]) for array in arrays) if size > 1 else 0 for k, size in enumerate(shape)]
    axis = extents.index(max(extents))
    count = -(-arrays[0].size // most)
    step = max(1, shape[axis] // count)
    if step * count < shape[axis] and (step + 1) * (arrays[0].size // shape[axis]) <= most:
        step += 1  # rather than a short one at the end
    for start in range(0, shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        yield from pieces(*[array[part] for array in arrays], times=times)


def cast(items: Array, source: str, out: Array, target: str) -> int:
    """Rounds numbers of one type of `CASTABLE` to another; both are unsigned integers in one shape, wherever they lie.

    Returns:
        How many were finite and have become infinite.
    """
    overflowed = 0
    for piece, part in pieces(items, out):
        values = widen(piece, source)
        overflowed += narrow(values, part, target)
    return overflowed


def measure_cast(items: Array, source: str, out: Array, target: str) -> Loss:
    """What `cast` has lost, of the same arguments afterwards."""
    loss = Loss()
    for piece, part in pieces(items, out):
        before = widen(piece, source)
        before = before if source in {"float64", "float32"} else np.array(before)  # which lies where the others will
        loss += measure(before, widen(part, target), source, target)
    return loss


def look_up(numbers: Array, table: Array) -> Array:
    """What numbers stand for, as float32 in scratch memory: the two or four elements of each side by side along the last axis.

    Args:
        numbers: unsigned integers; with what they stand for a piece.
        table: for each number its elements as one item.
    """
    *outer, last = numbers.shape
    values = _scratch.of(0, (*outer, last * table.itemsize // 4), np.float32)
    np.take(table, indices(numbers), out=values.view(table.dtype), mode="clip")
    return values


def indices(numbers: Array, begins: Array | None = None) -> Array:
    """Numbers as indices, in scratch memory that is also where `narrow` has its own: half as many as a piece has elements.

    Args:
        numbers: unsigned integers.
        begins: what is added to them first, as wide as it takes.
    """
    if begins is not None:
        numbers = np.add(numbers, begins, out=_scratch.of(2, numbers.shape, begins.dtype.type))
    indices = _scratch.of(1, numbers.shape, np.intp)
    np.copyto(indices, numbers)
    return indices


def widen(items: Array, dtype: str) -> Array:
    """The floats of a piece as float32, exactly, in scratch memory; those that are wide enough as they are."""
    if dtype in {"float64", "float32"}:
        return items.view(dtype)
    if items.itemsize == 1 and items.ndim and items.strides[-1] == 1 and items.shape[-1] % 2 == 0 and items.size:
        return look_up(items.view(np.uint16), _pairs(dtype))
    values = _scratch(0, items)
    words = values.view(np.uint32)
    if dtype == "bfloat16":
        np.copyto(words, items)
        np.left_shift(words, 16, out=words)
        return values
    if bound_of(items, dtype) < math.inf:
        np.multiply(shift(items, dtype), np.float32(2.0 ** power_of(dtype)), out=values)
    else:
        np.copyto(values, items.view(numpy_dtype(dtype)), casting="unsafe")
    return values


def bound_of(items: Array, dtype: str) -> float:
    """What no magnitude of some floats, as unsigned integers, exceeds; infinite where one is, or NaN, or of a type not in `_NARROW`."""
    if dtype not in _NARROW or not items.size:
        return math.inf
    limit, sign = _NARROW[dtype][2], 1 << 8 * items.itemsize - 1
    is_finite = items.view(f"i{items.itemsize}").max() < limit and items.max() < sign + limit
    return _LARGEST[dtype] if is_finite else math.inf


def power_of(dtype: str) -> int:
    """Which power of two what `shift` makes of a type is too small by."""
    return 127 - _NARROW[dtype][1]


def shift(items: Array, dtype: str) -> Array:
    """Floats with a finite `bound_of` as float32 in scratch memory that have their bits, too small by a power of two."""
    mantissa, _, _ = _NARROW[dtype]
    values, signed, sign = _scratch(0, items), items.view(f"i{items.itemsize}"), 1 << 8 * items.itemsize - 1
    words = values.view(np.uint32)
    np.copyto(words.view(np.int32), signed)  # all further bits are as the sign
    np.left_shift(words, 23 - mantissa, out=words)
    np.bitwise_and(words, 1 << 31 | (sign - 1) << 23 - mantissa, out=words)
    return values


@cache
def _pairs(dtype: str) -> Array:
    """For two floats of a byte each, as one number, both as float32, as one item."""
    floats = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    second, first = np.divmod(np.arange(1 << 16), 256)
    return np.stack([floats[first], floats[second]], -1).view(np.uint64).reshape(-1)


def is_one_pass(dtype: str, bound: float) -> bool:
    """Whether `narrow_products` of that bound takes one pass, and no scratch memory."""
    return bound <= _LARGEST[dtype] and dtype != "float16"


def narrow_products(values: Array, factors: Array, out: Array, dtype: str, *, bound: float) -> int:
    """`narrow` of float32 in scratch memory times others, which go along with them; ``bound`` is that of the products."""
    if is_one_pass(dtype, bound):  # between two, threads wait for each other
        np.multiply(values, factors, out=out.view(numpy_dtype(dtype)), casting="unsafe", dtype=np.float32)
        return 0
    np.multiply(values, factors, out=values)
    return narrow(values, out, dtype, bound=bound)


def narrow(values: Array, out: Array, dtype: str, operand: Array | None = None, *, bound: float = math.inf) -> int:
    """Rounds a piece of float32 or float64 to nearest, ties to even, into ``out``, the items of a type of `CASTABLE`.

    Args:
        values: in one shape with ``out``.
        out: where they go.
        dtype: of ``out``.
        operand: what they are made of.
        bound: what no magnitude exceeds; if it is finite, none is NaN either.

    Returns:
        How many are infinite there and finite as ``operand``, from which the values come: by default the values themselves.
    """
    if not values.size:
        return 0
    largest = _LARGEST[dtype]
    is_plain = bound <= largest
    if not is_plain:
        low = values.min()
        is_plain = -largest <= low and values.max() <= largest  # which NaNs are not
    single = values
    if values.dtype == np.float64 and dtype != "float64":
        single = _scratch(0, values)
        np.copyto(single, values, casting="unsafe")
    if dtype == "float16" and is_plain:
        _round_to_half(single, out)
    else:
        np.copyto(out.view(numpy_dtype(dtype)), single, casting="unsafe")
    if is_plain:
        return 0
    if np.isnan(low):
        out[np.isnan(values)] = _NAN[dtype]
    finite = np.isfinite(values if operand is None else operand)
    return int(np.count_nonzero(finite & np.isinf(out.view(numpy_dtype(dtype)))))


def _round_to_half(values: Array, out: Array) -> None:
    """Rounds float32 that float16 can hold: adding 1.5 * 2^13 times a number's own power of two leaves 11 bits of it, rounded to even.

    Of a number below the least normal one it is that one's power of two. What is left has the bits of a float16 in it, but for the bias
    of the exponent, which a product takes off, and the sign.
    """
    rounded, power = _scratch(1, values), _scratch(2, values)
    words, signs = rounded.view(np.uint32), power.view(np.uint32)
    np.bitwise_and(values.view(np.uint32), 0x7F800000, out=signs)
    np.clip(power, np.float32(2.0**-14), np.float32(2.0**16), out=power)
    np.multiply(power, np.float32(1.5 * 2.0**13), out=power)
    np.add(values, power, out=rounded)
    np.subtract(rounded, power, out=rounded)
    np.multiply(rounded, np.float32(2.0**-112), out=rounded)
    np.right_shift(words, 13, out=words)
    np.right_shift(values.view(np.uint32), 16, out=signs)
    np.bitwise_and(signs, 0x8000, out=signs)
    np.bitwise_or(words, signs, out=words)
    np.copyto(out, words, casting="unsafe")
