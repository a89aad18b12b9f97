"""Ops that decode matrices box by box: which items of each input, codes in words or values that blocks share, a region takes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, packed_strides, pull
from streamconv.graph.ops.cast import Rounding
from streamconv.graph.ops.op import Values
from streamconv.notation.axes import Axis, Leaf, Tree

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

Sizes = tuple[int, int, int]
"""Of a stack of matrices: matrices, rows, columns."""

_DIGITS = ("matrix", "row", "column")
_FEW = 1 << 12  # elements: what so many take may be more than what they take each, since they share none of it


@dataclass(frozen=True)
class Step:
    """Along an axis: each ``count`` elements, the last ones perhaps fewer, lie in ``items`` of an input, or share them."""

    count: int = 1
    items: int = 1

    def items_of(self, elements: range, size: int) -> range:
        """The items, of ``size``, that some elements lie in."""
        if self.count == self.items == 1:
            return elements
        last = -(-(elements[-1] + 1) // self.count) * self.items
        return range(elements.start // self.count * self.items, min(size, last))


@dataclass(frozen=True)
class Grid:
    """An input of an op beside its matrices: how many items it has, of matrices, down and across, and how elements lie in them."""

    sizes: Sizes
    rows: Step = Step()
    columns: Step = Step()

    def items_of(self, box: Box) -> Box:
        """The items that a box of the matrices takes."""
        matrices = box.matrices if self.sizes[0] > 1 else range(1)
        return Box(matrices, self.rows.items_of(box.rows, self.sizes[1]), self.columns.items_of(box.columns, self.sizes[2]))


@dataclass(frozen=True)
class Box:
    """Matrices of a stack, rows and columns of them, each from one on in equal steps."""

    matrices: range
    rows: range
    columns: range

    @property
    def axes(self) -> tuple[range, range, range]:
        return self.matrices, self.rows, self.columns

    @property
    def sizes(self) -> Sizes:
        return len(self.matrices), len(self.rows), len(self.columns)

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def region(self, sizes: Sizes) -> Move:
        """The box as a region of a stack of these sizes, packed."""
        strides = packed_strides(sizes)
        start = sum(axis.start * stride for axis, stride in zip(self.axes, strides, strict=True))
        steps = tuple(axis.step * stride for axis, stride in zip(self.axes, strides, strict=True))
        return Move(self.sizes, 0, packed_strides(self.sizes), start, steps)

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where the box is in a larger one that holds it."""
        slices = []
        for inner, around in zip(self.axes, outer.axes, strict=True):
            start, step = (inner.start - around.start) // around.step, max(1, inner.step // around.step)
            slices.append(slice(start, start + (len(inner) - 1) * step + 1, step))
        return tuple(slices)


@dataclass(frozen=True)
class Piece:
    """A part of a region whose elements' matrix, row and column are affine in its indices: where it lies, and these three."""

    sizes: tuple[int, ...]
    dst: int
    dst_strides: tuple[int, ...]
    places: tuple[tuple[int, tuple[int, ...]], ...]

    def progressions(self) -> list[range]:
        """The matrices, rows and columns that it takes, and perhaps others between them."""
        axes = []
        for first, steps in self.places:
            advance = common = 0
            for n, step in zip(self.sizes, steps, strict=True):
                if step and n > 1:
                    advance += (n - 1) * step
                    common = math.gcd(common, step)
            axes.append(range(first, first + advance + 1, common or 1))
        return axes

    def parts(self, count: int, units: Sizes) -> list[Piece]:
        """The piece in so many, or as many as can be, along matrices, else rows, else columns, between whole ``units`` of these.

        One part is left where all of it is in one unit of each.
        """
        for (first, steps), unit in zip(self.places, units, strict=True):
            advances = [(n - 1) * step for n, step in zip(self.sizes, steps, strict=True)]
            if max(advances, default=0) <= 0:
                continue
            axis = advances.index(max(advances))
            length, unit = self.sizes[axis], unit if steps[axis] == 1 else 1  # noqa: PLW2901
            size = -(-max(1, length // count) // unit) * unit
            starts = [0, *range(size - first % unit, length, size)]
            if len(starts) > 1:
                return [self._part(axis, start, end - start) for start, end in pairwise([*starts, length])]
        return [self]

    def _part(self, axis: int, start: int, size: int) -> Piece:
        sizes = (*self.sizes[:axis], size, *self.sizes[axis + 1 :])
        places = tuple((first + start * steps[axis], steps) for first, steps in self.places)
        return Piece(sizes, self.dst + start * self.dst_strides[axis], self.dst_strides, places)


class Boxed(Rounding):
    """An op whose output is a stack of matrices, decoded box by box. It is no elementwise one: what it takes lies otherwise.

    Attributes:
        shape: of the output: rows and columns, after the sizes of a stack, if it is one.
        dtype: what comes of it.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    @abstractmethod
    def grids(self) -> tuple[Grid, ...]:
        """The inputs."""

    @abstractmethod
    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """The numbers of a box as float32, in its sizes, and what no magnitude exceeds, infinite if they may be that, or NaN.

        Args:
            items: those of each input that `Grid.items_of` says.
            box: which of the matrices' elements.
        """

    @property
    def units(self) -> Sizes:
        """Matrices, rows and columns that are decoded together, since they share items of the inputs."""
        rows = math.lcm(*(grid.rows.count for grid in self.grids if grid.rows.items > 1))
        columns = math.lcm(*(grid.columns.count for grid in self.grids if grid.columns.items > 1))
        return 1, rows, columns

    def size_of(self, box: Box, items: Sequence[Box]) -> int:
        """How large the numbers are that decoding a box makes, in elements, where it takes these items of the inputs."""
        return max(box.numel, *(one.numel for one in items))

    def store(self, numbers: Array, target: Array, bound: float) -> int:
        """Has numbers that `decode` made in ``target``, the output's items; gives how many became infinite."""
        from streamconv.graph.casts import narrow

        return narrow(numbers, target, self.dtype, bound=bound)

    @property
    def grains(self) -> tuple[int, ...]:
        """See `Compute.grains`: whole units of rows, and rows."""
        return self.shape[-1] * self.units[1], self.shape[-1]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        numels = [math.prod(grid.sizes) for grid in self.grids]
        if len(self.shape) < 2 or self.dtype not in CASTABLE or [spec.numel for spec in inputs] != numels:
            found = ", ".join(map(str, inputs))
            raise CoverageError(f"{self.kind} makes {self.dtype}{list(self.shape)} of {numels} items, not of {found}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    def cut(self, region: Move, inputs: Sequence[TensorSpec]) -> Iterator[Move]:
        """See `Compute.cut`: a region whose box holds much that it does not take goes by halves."""
        bounds = self.reach(region.numel, inputs)
        if all(need.numel <= bound for need, bound in zip(self.needs(region, inputs), bounds, strict=True)) or region.numel < 2:
            yield region
            return
        axis = max((k for k, n in enumerate(region.sizes) if n > 1), key=lambda k: region.src_strides[k])
        tile = list(region.sizes)
        tile[axis] = -(-tile[axis] // 2)
        for half in region.tiles(tuple(tile)):
            yield from self.cut(half, inputs)

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        box = self._around(list(self._pieces(region)))
        return [grid.items_of(box).region(grid.sizes) for grid in self.grids]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`: twice what so many elements side by side take, but of a few what they take each; or lines of them."""
        *_, height, width = self.shape
        lines = min(height, -(-numel // width) + 1)
        bounds = []
        for grid, spec in zip(self.grids, inputs, strict=True):
            down, across = grid.rows, grid.columns
            each = down.items * across.items
            dense = -(-numel * each // (min(down.count, height) * min(across.count, width)))
            whole = each * -(-lines // down.count) * -(-min(numel, width) // across.count)
            bounds.append(min(spec.numel, max(2 * dense + each * min(numel, _FEW), whole)))
        return bounds

    def piece(self, inputs: Sequence[TensorSpec] | Sequence[Values]) -> int:  # noqa: ARG002
        """How many elements are decoded at once, of such inputs."""
        from streamconv.graph.casts import PIECE

        return PIECE

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        from streamconv.graph.casts import PIECE

        # of a piece codes, scales and numbers, and what they are on the way
        return (super().scratch(inputs) + 24 * PIECE) * self.piece(inputs) // PIECE

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        import numpy as np

        from streamconv.graph.arrays import view

        overflowed = 0
        for piece, box, items in self.boxes(region, parts, out):
            decoded, bound = self.decode(items, box)
            numbers = np.ascontiguousarray(decoded).reshape(-1)
            strides, start = places_in(piece, box)
            target = view(out.items, piece.sizes, piece.dst_strides, piece.dst)
            overflowed += self.store(view(numbers, piece.sizes, strides, start), target, bound)
        return overflowed

    def boxes(self, region: Move, parts: Sequence[Values], out: Values | None = None) -> Iterator[tuple[Piece, Box, list[Values]]]:
        """A region piece by piece: each with its box, and the items of each input that the box takes; pieces lie as ``out`` does."""
        if out is not None:
            region = replace(region, dst_strides=tuple(stride // out.items.itemsize for stride in out.items.strides))
        pieces = list(self._pieces(region))
        around, grids = self._around(pieces), self.grids
        wholes = [grid.items_of(around) for grid in grids]
        units, most = self.units, self.piece(parts)
        while pieces:
            piece = pieces.pop()
            box = self._around([piece])
            around_items = [grid.items_of(box) for grid in grids]
            numel = self.size_of(box, around_items)
            if numel > most and len(smaller := piece.parts(-(-numel // most), units)) > 1:
                pieces += smaller
                continue
            items = []
            for part, one, whole in zip(parts, around_items, wholes, strict=True):
                items.append(Values(part.items[one.within(whole)], part.dtype))
            yield piece, box, items

    def _pieces(self, region: Move) -> Iterator[Piece]:
        for _, move, digits in pull(self._tree, region):
            yield Piece(move.sizes, move.dst, move.dst_strides, tuple(digits[name] for name in _DIGITS))

    @property
    def _tree(self) -> Tree:
        *_, rows, columns = self.shape
        return Axis(_DIGITS[0], rows * columns, Axis(_DIGITS[1], columns, Axis(_DIGITS[2], 1, Leaf(0))))

    def _around(self, pieces: Sequence[Piece]) -> Box:
        """The smallest box that holds some pieces."""
        return Box(*(_join(axes) for axes in zip(*(piece.progressions() for piece in pieces), strict=True)))


def _join(axes: Sequence[range]) -> range:
    """The smallest progression that holds some."""
    first = axes[0]
    if len(axes) == 1:
        return first
    step = math.gcd(*(axis.step for axis in axes if len(axis) > 1), *(axis.start - first.start for axis in axes))
    return range(min(axis.start for axis in axes), max(axis[-1] for axis in axes) + 1, step or 1)


def places_in(piece: Piece, box: Box) -> tuple[tuple[int, ...], int]:
    """Where the elements of a piece are in the packed box that holds it: their strides, and the first."""
    strides, start = [0] * len(piece.sizes), 0
    for (first, steps), axis, unit in zip(piece.places, box.axes, packed_strides(box.sizes), strict=True):
        start += (first - axis.start) // axis.step * unit
        strides = [stride + step // axis.step * unit for stride, step in zip(strides, steps, strict=True)]
    return tuple(strides), start
