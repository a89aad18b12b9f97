"""Blocks of a matrix that share a scale: which scales a region of the matrix takes, and one-byte floats times theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, packed_strides, place, pull
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Elementwise, Values
from streamconv.notation.axes import Axis, Leaf, Place, Tree

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_BLOCK = ("matrix", "down", "across")  # where a block is
_MANY = 8  # codes to a scale, for which another one more does not count
_MOST = 2.0**7  # a larger scale may have no float32 that is 2^120 times as large
SCALES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint8")
"""What scales of one-byte floats may be."""


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks from its first corner, those at its ends as short as it takes.

    Blocks of a row each are ``(1, columns)``, one block of all is ``(rows, columns)``.

    Attributes:
        shape: rows and columns of the matrix, after the sizes of a stack of them.
        block: rows and columns of a block.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]

    @property
    def counts(self) -> tuple[int, ...]:
        """How many blocks there are: the shape of a tensor with a value for each."""
        *stack, rows, columns = self.shape
        return *stack, -(-rows // self.block[0]), -(-columns // self.block[1])

    def around(self, region: Move) -> Move:
        """The region of the blocks' values that a region of the matrix takes: the smallest box of blocks that holds it."""
        starts, sizes = self._box(region)
        down, across = self.counts[-2:]
        strides = (down * across, across, 1)
        return Move(sizes, 0, packed_strides(sizes), sum(map(int.__mul__, starts, strides)), strides)

    def spread(self, region: Move) -> Iterator[Move]:
        """Which value is that of which element: moves from what `around` says, packed, to where the region lies.

        Along axes within a block they do not advance in their source.
        """
        starts, sizes = self._box(region)
        strides = packed_strides(sizes)
        where = Place(0, -sum(map(int.__mul__, starts, strides)), {**dict(zip(_BLOCK, strides, strict=True)), "row": 0, "column": 0})
        for _, piece, digits in pull(self._tree, region):
            yield place(piece, digits, where)

    def _box(self, region: Move) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The first matrix, row and column of blocks that a region touches, and how many of each."""
        lasts = [0] * len(_BLOCK)
        starts: list[int] = []
        for _, piece, digits in pull(self._tree, region):
            firsts, ends = [], []
            for first, steps in (digits[name] for name in _BLOCK):
                advance = sum((n - 1) * step for n, step in zip(piece.sizes, steps, strict=True))
                firsts.append(first)
                ends.append(first + advance)
            starts = list(map(min, starts or firsts, firsts))
            lasts = list(map(max, lasts, ends))
        return tuple(starts), tuple(last - first + 1 for first, last in zip(starts, lasts, strict=True))

    @property
    def _tree(self) -> Tree:
        """The digits of an element's place: its matrix, block of rows, row in it, block of columns, column in it."""
        *_, rows, columns = self.shape
        high, wide = self.block
        inner = Axis("row", columns, Axis(_BLOCK[2], wide, Axis("column", 1, Leaf(0))))
        return Axis(_BLOCK[0], rows * columns, Axis(_BLOCK[1], high * columns, inner))


@dataclass(frozen=True)
class Dequantize(Rounding, Elementwise):
    """Matrices of one-byte floats times the scale of each of their blocks, both as float32, rounded once; NaNs as those of `Cast`.

    Attributes:
        shape: rows and columns of the matrix, after the sizes of a stack of them.
        block: rows and columns of a block; the last ones of a matrix may be cut off.
        dtype: what comes of it.
    """

    kind: ClassVar[str] = "dequantize"

    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: str = "bfloat16"

    @property
    def blocks(self) -> Blocks:
        """The blocks of the matrix."""
        return Blocks(self.shape, self.block)

    @property
    def grains(self) -> tuple[int, ...]:
        """See `Compute.grains`: rows of blocks, and rows."""
        return self.shape[-1] * min(self.block[0], self.shape[-2]), self.shape[-1]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        matrix, scales = inputs
        if matrix.dtype.nbytes != 1 or not matrix.dtype.floating or matrix.shape != self.shape or len(self.shape) < 2:
            raise CoverageError(f"expected a matrix of one-byte floats {list(self.shape)}, found {matrix}")
        if scales.dtype.name not in SCALES or scales.shape != self.blocks.counts:
            blocks = " x ".join(map(str, self.block))
            wanted = list(self.blocks.counts)
            raise CoverageError(f"the scales of {matrix} in blocks of {blocks} must be floats {wanted}, found {scales}")
        if self.dtype not in CASTABLE:
            raise CoverageError(f"{matrix} becomes one of {', '.join(CASTABLE)}, not {self.dtype}")
        return TensorSpec(DTYPES[self.dtype], matrix.shape)

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        """The region, and the scales of its blocks."""
        return [region, self.blocks.around(region)]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`: scattered elements may be in any of the blocks."""
        return [numel, inputs[1].numel]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        from streamconv.graph.casts import PIECE

        return super().scratch(inputs) + 8 * PIECE  # scales in float32, and on the way there

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        from streamconv.graph.arrays import view
        from streamconv.graph.casts import is_one_pass, narrow_products, pieces

        codes, factors = parts[0], _Factors(*parts)
        overflowed, times = 0, 2 if is_one_pass(out.dtype.name, factors.bound) else 1  # longer pieces, where scratch memory is to spare
        lying = replace(region, dst_strides=tuple(stride // out.items.itemsize for stride in out.items.strides))
        for read, write in zip(self.blocks.spread(region), self.blocks.spread(lying), strict=True):
            views = (
                view(codes.items, read.sizes, read.dst_strides, read.dst),
                view(factors.items, read.sizes, read.src_strides, read.src),
                view(out.items, write.sizes, write.dst_strides, write.dst),
            )
            for piece, spread, result in pieces(*views, times=times):
                overflowed += narrow_products(factors.widen(piece), factors.of(spread), result, out.dtype.name, bound=factors.bound)
        return overflowed


class _Factors:
    """What the codes of a region, floats of a byte each, are multiplied with to be numbers.

    Where all codes are finite, the bits of one are those of a float32 that is too small by a power of two: the scales are multiplied with
    that instead, which is exact, too.

    Args:
        codes: of the region.
        scales: of its blocks.

    Attributes:
        items: the scales as float32, unless they are too many to be so at once.
        bound: what no magnitude of a number exceeds, infinite where that is not known.
    """

    def __init__(self, codes: Values, scales: Values) -> None:
        from streamconv.graph.casts import PIECE, bound_of
        from streamconv.graph.codes import factors, largest

        self._codes, self._scales = codes.dtype.name, scales.dtype.name
        self._are_wide = scales.items.size <= PIECE
        self.items: Array = factors(scales.items, self._scales) if self._are_wide else scales.items
        most = largest(self.items) if self._are_wide else math.inf
        bound = bound_of(codes.items, self._codes) if most < _MOST else math.inf
        self.bound = most * bound if bound < math.inf else math.inf

    def widen(self, codes: Array) -> Array:
        """Codes as float32 in scratch memory, too small by a power of two where a bound is known."""
        from streamconv.graph.casts import shift, widen

        return shift(codes, self._codes) if self.bound < math.inf else widen(codes, self._codes)

    def of(self, spread: Array) -> Array:
        """Those of such codes, of ``items`` as many as codes; once for all that share one, unless their rows are short."""
        import numpy as np

        from streamconv.graph.casts import power_of
        from streamconv.graph.codes import factors

        once = spread[tuple(slice(None if stride else 1) for stride in spread.strides)]
        found = once if self._are_wide else factors(once, self._scales)
        if self.bound < math.inf:
            found = found * np.float32(2.0 ** power_of(self._codes))
        last = spread.shape[-1] if spread.ndim else 1
        if spread.ndim > 1 and found.shape[-1] == 1 and _MANY * last * found.size <= spread.size:
            return np.repeat(found, last, -1)
        return found
