"""Quantized weights as numbers: integers with scales and zero points, small floats with scales, quantiles of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import BLOCK_TYPES, CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.ops.boxes import Box, Boxed, Grid, Sizes, Step
from streamconv.graph.ops.op import Values
from streamconv.graph.ops.tabulated import Tabulated

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

WORD = 32  # bits of the words that integers are packed into
ROWS, COLUMNS, AWQ, BYTES = "rows", "columns", "awq", "bytes"
"""How integers lie: in words filled along rows or columns, in words as AWQ fills them, signed in a byte each."""

_FLOATS = (*(name for name in DTYPES if name.startswith("float8")), "float4_e2m1fn", "float6_e2m3fn", "int8")
_LARGEST = {"float4_e2m1fn": 6.0, "float6_e2m3fn": 7.5, "int8": 128.0}
DIVIDES, MULTIPLIES = "divides", "multiplies"
NONE: Mapping[int, int] = MappingProxyType({})


def stack_of(shape: Sequence[int]) -> Sizes:
    """Matrices, rows and columns of a shape."""
    *outer, rows, columns = shape
    return math.prod(outer), rows, columns


def blocks_of(shape: Sequence[int], block: tuple[int, int]) -> Grid:
    """A value for each block of so many rows and columns; the last ones of a matrix may be short."""
    count, rows, columns = stack_of(shape)
    down, across = min(block[0], rows), min(block[1], columns)
    return Grid((count, -(-rows // down), -(-columns // across)), Step(down), Step(across))


def _filling(bits: int) -> tuple[int, int]:
    """How many integers fill how many words."""
    return (WORD // bits, 1) if WORD % bits == 0 else (WORD, bits)


@dataclass(frozen=True)
class DequantizeIntegers(Tabulated):
    """Integers less their zero points, times their scales, in the dtype of the scales; then rounded to ``dtype``.

    The inputs are the codes, the scales of blocks, the zero points, if there are any, and, if there is an ``index``, the number of the
    group of each row or column.

    Attributes:
        shape: see `Boxed`.
        dtype: see `Boxed`.
        bits: of a code.
        along: how codes lie.
        block: rows and columns that share a scale.
        zeros: how zero points lie, each beside its scale; empty: there are none.
        offset: is taken from unsigned codes and zero points.
        plus: what is added to stored zero points: to each word as a number, so that a carry goes on, or to integers that cross words.
        index: which of rows and columns have a group of their own each; empty: neither.
    """

    kind: ClassVar[str] = "dequantize_integers"

    shape: tuple[int, ...]
    dtype: str
    bits: int
    along: str
    block: tuple[int, int]
    zeros: str = ""
    offset: int = 0
    plus: int = 0
    index: str = ""

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        kinds = (ROWS, COLUMNS, AWQ, BYTES)
        is_in_range = 1 <= self.bits <= 8 and 0 <= self.offset <= 128 and 0 <= self.plus <= 1
        if (
            not is_in_range
            or self.index not in ("", ROWS, COLUMNS)
            or self.along not in kinds
            or self.zeros not in ("", *kinds)
            or min(self.block) < 1
        ):
            raise CoverageError(f"{self.kind}: no integers of {self.bits} bits along {self.along!r}, zero points along {self.zeros!r}")
        return super().infer(inputs)

    @property
    def grids(self) -> tuple[Grid, ...]:
        stack, scales = stack_of(self.shape), self._scales
        grids = [self._lie(Grid(stack), self.along), scales]
        if self.zeros:
            grids.append(self._lie(scales, self.zeros))
        if self.index == ROWS:
            grids.append(Grid((1, stack[1], 1), columns=Step(stack[2])))
        if self.index == COLUMNS:
            grids.append(Grid((1, 1, stack[2]), rows=Step(stack[1])))
        return tuple(grids)

    @property
    def _scales(self) -> Grid:
        grid = blocks_of(self.shape, self.block)
        if self.index == ROWS:
            return Grid(grid.sizes, Step(self.shape[-2], grid.sizes[1]), grid.columns)
        if self.index == COLUMNS:
            return Grid(grid.sizes, grid.rows, Step(self.shape[-1], grid.sizes[2]))
        return grid

    def _lie(self, grid: Grid, along: str) -> Grid:
        """The words of integers that lie so in a grid."""
        if along == BYTES:
            return grid
        per, words = _filling(self.bits)
        (count, down, across), rows, columns = grid.sizes, grid.rows, grid.columns
        if along == ROWS:
            return Grid((count, -(-down * self.bits // WORD), across), _in_words(rows, per, words), columns)
        return Grid((count, down, -(-across * self.bits // WORD)), rows, _in_words(columns, per, words))

    @property
    def per_byte(self) -> int:
        """See `Tabulated.per_byte`."""
        return 0 if self.along != COLUMNS or self.bits not in {2, 4, 8} or self.zeros or self.index else 8 // self.bits

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        import numpy as np

        from streamconv.graph import codes

        groups = items[-1] if self.index else None
        values = self._numbers(items, box, groups)
        name = items[1].dtype.name
        scales = codes.factors(items[1].items, name)
        bound = codes.largest(scales) * 2 ** (self.bits + 1)  # less a zero point, and rounded up
        if groups is None:
            if self.block[0] > 1:
                scales = codes.spread(scales, 1, box.rows, self.block[0], box.rows.start // self.block[0])
            values = codes.multiply(values, scales, box.columns, self.block[1])
        else:
            np.multiply(values, self._of_elements(scales, self._scales, box, groups), out=values)
        return values if name == self.dtype else codes.round_to(values, name), bound

    def _numbers(self, items: Sequence[Values], box: Box, groups: Values | None) -> Array:
        """The codes of a box less their zero points, as float32."""
        import numpy as np

        from streamconv.graph import codes

        if self.along == COLUMNS and self.bits in {2, 4} and not self.zeros and box.columns.step == 1:
            per = WORD // self.bits
            numbers = codes.look_up_integers(items[0].items.view(np.uint8), self.bits, self.offset)
            return numbers[..., box.columns.start % per :][..., : len(box.columns)]
        integers = self._integers(items[0], self.along, Grid(stack_of(self.shape)), box)
        if self.zeros:
            integers = integers - self._integers(items[2], self.zeros, self._scales, box, groups, self.plus)
        elif self.along != BYTES:
            integers = integers - np.int16(self.offset)
        return integers.astype(np.float32)

    def _integers(self, values: Values, along: str, grid: Grid, box: Box, groups: Values | None = None, plus: int = 0) -> Array:
        """Integers, for each element of a box, of words that lie so in a grid."""
        import numpy as np

        from streamconv.graph import codes

        if along == BYTES:
            return self._of_elements(values.items.view(np.int8).astype(np.int16), grid, box, groups)
        words = values.items.view(np.uint32)
        axis, step, elements = (1, grid.rows, box.rows) if along == ROWS else (2, grid.columns, box.columns)
        per, _ = _filling(self.bits)
        if plus and WORD % self.bits == 0:
            words = words + np.uint32(sum(plus << shift for shift in range(0, WORD, self.bits)))
        integers = codes.unpack(words, self.bits, axis)
        if along == AWQ:
            integers = codes.reorder_awq(integers)
        if plus and WORD % self.bits:
            integers = (integers + np.uint8(plus)) & np.uint8((1 << self.bits) - 1)
        first = elements.start // (step.count * per) * per if step.items == 1 else 0
        return self._of_elements(integers.astype(np.int16), grid, box, groups, {axis: first})

    def _of_elements(self, values: Array, grid: Grid, box: Box, groups: Values | None = None, firsts: Mapping[int, int] = NONE) -> Array:
        """What elements of a box share by a grid, or by their ``groups``; ``firsts``: numbers of first values that are not the box's."""
        import numpy as np

        from streamconv.graph import codes

        for axis, step, elements, name in ((1, grid.rows, box.rows, ROWS), (2, grid.columns, box.columns, COLUMNS)):
            if groups is not None and self.index == name:
                values = np.take(values, groups.items.reshape(-1).view(np.int32), axis)
            elif axis in firsts or step.count > 1:
                values = codes.spread(values, axis, elements, step.count, firsts.get(axis, elements.start // step.count))
        return values


def _in_words(step: Step, per: int, words: int) -> Step:
    """The step of what lies in words that ``per`` of its items fill so many of; all of it, where all items are taken anyway."""
    return Step(step.count * per, words) if step.items == 1 else Step(step.count, -(-step.items * words // per))


@dataclass(frozen=True)
class DequantizeFloats(Tabulated):
    """Codes of a small type times the scale of their block, rounded to ``through``, then to ``dtype``.

    The inputs are the codes, the scales, and, if there is a ``shared`` one, a scale of all scales. Products and quotients are float32.

    Attributes:
        shape: see `Boxed`.
        dtype: see `Boxed`.
        codes: what they are: a type of DTYPES, of which packed ones lie in bytes, the first in the lowest bits; or int8.
        block: rows and columns that share a scale.
        through: what the product is rounded to first; empty: the scales' own type.
        shared: the scale of all scales "divides" or "multiplies" them; empty: there is none.
        factor: what the product, rounded to float32, is multiplied with.
        powers: scales are exponents in bytes, of which 255 is 2^128, too.
    """

    kind: ClassVar[str] = "dequantize_floats"

    shape: tuple[int, ...]
    dtype: str
    codes: str
    block: tuple[int, int]
    through: str = "float32"
    shared: str = ""
    factor: float = 1.0
    powers: bool = False

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if (
            self.codes not in _FLOATS
            or min(self.block) < 1
            or self.shared not in ("", DIVIDES, MULTIPLIES)
            or self.through not in ("", *CASTABLE)
        ):
            raise CoverageError(
                f"{self.kind}: no codes {self.codes!r} with a scale of scales that {self.shared!r}, through {self.through!r}"
            )
        return super().infer(inputs)

    @property
    def _packing(self) -> tuple[int, int]:
        """How many codes lie in how many bytes."""
        dtype = DTYPES[self.codes]
        return dtype.block, dtype.nbytes

    @property
    def grids(self) -> tuple[Grid, ...]:
        stack = stack_of(self.shape)
        count, nbytes = self._packing
        lying = Grid((stack[0], stack[1], -(-stack[2] // count) * nbytes), columns=Step(count, nbytes))
        shared = Grid((1, 1, 1), Step(stack[1]), Step(stack[2]))
        return (lying, blocks_of(self.shape, self.block), *([shared] if self.shared else []))

    @property
    def per_byte(self) -> int:
        """See `Tabulated.per_byte`: what int8 stands for is made as quickly."""
        count, nbytes = self._packing
        return count if nbytes == 1 and self.codes != "int8" else 0

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        import numpy as np

        from streamconv.graph import codes

        values = self._numbers(items[0].items.view(np.uint8), box)
        grid = blocks_of(self.shape, self.block)
        scales = codes.factors(items[1].items, items[1].dtype.name)
        if self.shared:
            whole = codes.factors(items[2].items, items[2].dtype.name)
            scales = scales / whole if self.shared == DIVIDES else scales * whole
        # Of those types no code is NaN or infinite.
        bound = 2 * codes.largest(scales) * self.factor * _LARGEST[self.codes] if self.codes in _LARGEST else math.inf
        if grid.rows.count > 1:
            scales = codes.spread(scales, 1, box.rows, grid.rows.count, box.rows.start // grid.rows.count)
        if self.powers and np.isinf(scales).any():  # which half of a value may not be
            values = codes.multiply(values, np.minimum(scales, np.float32(2.0**127)), box.columns, grid.columns.count)
            scales = np.where(np.isinf(scales), np.float32(2), np.float32(1))
        values = codes.multiply(values, scales, box.columns, grid.columns.count)
        if self.factor != 1:
            np.multiply(values, np.float32(self.factor), out=values)
        through = self.through or items[1].dtype.name
        return values if through == self.dtype else codes.round_to(values, through), bound

    def _numbers(self, octets: Array, box: Box) -> Array:
        """The numbers of codes, as float32."""
        import numpy as np

        from streamconv.graph import codes

        if self.codes == "int8":
            return octets.view(np.int8).astype(np.float32)
        count, nbytes = self._packing
        first = box.columns.start // count * count
        if self.codes == "float4_e2m1fn":
            return codes.spread(codes.look_up(octets, codes.E2M1), 2, box.columns, 1, first)
        if count > 1:
            octets = codes.spread(codes.unpack(octets, 8 * nbytes // count, 2), 2, box.columns, 1, first)
        return codes.table(self.codes)[octets]


@dataclass(frozen=True)
class DequantizeQuantiles(Boxed):
    """Four bits that number the values of a table, the first code of a byte in its high bits, times the largest of their block.

    A block is so many elements one after the other, over the ends of rows: the shape is one row of all. The largest ones are float32, or
    numbered in a byte each, in blocks of their own: then the inputs are these bytes, the largest of their blocks, and what they number.

    Attributes:
        shape: see `Boxed`.
        dtype: see `Boxed`.
        table: what the sixteen codes stand for.
        block: elements that share a largest one.
        through: what the product is rounded to first.
        inner: of how many blocks the largest ones are a block of their own; 0: they are float32.
        offset: what is added to them.
    """

    kind: ClassVar[str] = "dequantize_quantiles"

    shape: tuple[int, ...]
    dtype: str
    table: tuple[float, ...]
    block: int
    through: str
    inner: int = 0
    offset: float = 0.0

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(self.table) != 16 or self.shape[:-1] != (1,) or self.block < 1 or self.inner < 0 or self.through not in CASTABLE:
            raise CoverageError(f"{self.kind}: expected a row, sixteen values and blocks, found {self}")
        return super().infer(inputs)

    @property
    def grids(self) -> tuple[Grid, ...]:
        numel = self.shape[-1]
        count = -(-numel // self.block)
        grids = [Grid((1, 1, -(-numel // 2)), columns=Step(2)), Grid((1, 1, count), columns=Step(self.block))]
        if self.inner:
            grids.append(Grid((1, 1, -(-count // self.inner)), columns=Step(self.block * self.inner)))
            grids.append(Grid((1, 1, 256), columns=Step(numel, 256)))
        return tuple(grids)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        import numpy as np

        from streamconv.graph import codes

        octets, columns = items[0].items.view(np.uint8), box.columns
        values = codes.spread(codes.look_up(octets, self.table, high_first=True), 2, columns, 1, columns.start // 2 * 2)
        largest = items[1].items
        if self.inner:
            blocks = range(columns.start // self.block, columns[-1] // self.block + 1)
            beside = codes.spread(items[2].items.view(np.float32), 2, blocks, self.inner, blocks.start // self.inner)
            largest = items[3].items.view(np.float32).reshape(-1)[largest.view(np.uint8)] * beside + np.float32(self.offset)
        largest = codes.spread(largest.view(np.float32), 2, columns, self.block, columns.start // self.block)
        np.multiply(values, largest, out=values)
        return values if self.through == self.dtype else codes.round_to(values, self.through), math.inf


@dataclass(frozen=True)
class DequantizeBlocks(Boxed):
    """Blocks of GGUF, which hold their scales, as float32, rounded once.

    Attributes:
        shape: see `Boxed`; rows consist of whole blocks.
        dtype: see `Boxed`.
        codes: the type of the blocks, one of `BLOCK_TYPES`.
    """

    kind: ClassVar[str] = "dequantize_blocks"

    shape: tuple[int, ...]
    dtype: str
    codes: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        block = BLOCK_TYPES[self.codes].block if self.codes in BLOCK_TYPES else 0
        if not block or not self.shape or self.shape[-1] % block:
            raise CoverageError(f"{self.kind}: rows of {list(self.shape)} do not consist of blocks of {self.codes}")
        return super().infer(inputs)

    @property
    def grids(self) -> tuple[Grid, ...]:
        count, rows, columns = stack_of(self.shape)
        blocks = BLOCK_TYPES[self.codes]
        return (Grid((count, rows, columns // blocks.block * blocks.nbytes), columns=Step(blocks.block, blocks.nbytes)),)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        import numpy as np

        from streamconv.graph import codes
        from streamconv.graph.gguf_blocks import DECODERS

        nbytes, block = BLOCK_TYPES[self.codes].nbytes, BLOCK_TYPES[self.codes].block
        octets = np.ascontiguousarray(items[0].items).view(np.uint8)
        values = DECODERS[self.codes](octets.reshape(-1, nbytes)).reshape(*octets.shape[:2], -1)
        return codes.spread(values, 2, box.columns, 1, box.columns.start // block * block), math.inf
