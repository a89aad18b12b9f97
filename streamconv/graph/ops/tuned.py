"""What was trained beside a weight, put into it: products of small matrices added to it, its lines scaled, or given a magnitude.

All is float32, rounded once, unless an op says otherwise; NaNs are those of `Cast`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.losses import Loss
from streamconv.graph.moves import Move
from streamconv.graph.ops.boxes import Box, Boxed, Grid, Sizes, Step, places_in
from streamconv.graph.ops.op import Fetch, Reduce, Values

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_HIGH, _WIDE, _LEAST = 32, 512, 8  # rows and columns of a product that is made at once, and the fewest
_ALONE = 1 << 18  # multiplications of a product that OpenBLAS makes in one thread


class Tuned(Boxed):
    """An op whose first input is a weight, and whose output is what it becomes."""

    @property
    def units(self) -> Sizes:
        """See `Boxed.units`: whatever else it takes is small."""
        return 1, 1, 1

    def size_of(self, box: Box, items: Sequence[Box]) -> int:  # noqa: ARG002
        """See `Boxed.size_of`."""
        return box.numel

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if any(spec.dtype.name not in CASTABLE for spec in inputs):
            raise CoverageError(f"{self.kind}: takes {', '.join(CASTABLE)}, found {', '.join(map(str, inputs))}")
        return super().infer(inputs)

    def within(self, numbers: Array, box: Box) -> Array:  # noqa: ARG002
        """A box of the output's shape, of what is taken of the weight for it."""
        return numbers

    def change(self, region: Move, parts: Sequence[Values], out: Values) -> Loss | None:
        """See `Compute.change`: how many elements of the weight, as one of the output's dtype, are others in the output."""
        import numpy as np

        from streamconv.graph.arrays import view
        from streamconv.graph.casts import cast

        changed = 0
        for piece, box, items in self.boxes(region, parts, out):
            strides, start = places_in(piece, box)
            weight = np.ascontiguousarray(self.within(items[0].items, box))
            if parts[0].dtype != out.dtype:
                own = weight
                weight = np.empty(own.shape, out.items.dtype)
                cast(own, parts[0].dtype.name, weight, out.dtype.name)
            before = view(weight.reshape(-1), piece.sizes, strides, start)
            after = view(out.items, piece.sizes, piece.dst_strides, piece.dst)
            changed += int(np.count_nonzero(before != after))
        return Loss(compared=region.numel, changed=changed)


@dataclass(frozen=True)
class AddProducts(Tuned):
    """``W + scale * product``: a matrix, or a stack of them, and the elementwise product of some others.

    Each other is given by its factors, (rows, rank) and (rank, columns), which are multiplied as BLAS does it in one order, or is given
    itself, where its rank is 0.

    Attributes:
        shape: of W.
        dtype: what comes of it.
        ranks: of the others.
        scale: as float32.
        through: a dtype to which the product is rounded before it is added, if any.
    """

    kind: ClassVar[str] = "add_products"

    shape: tuple[int, ...]
    dtype: str
    ranks: tuple[int, ...]
    scale: float
    through: str = ""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """See `Boxed.grids`."""
        *stack, rows, columns = self.shape
        count = math.prod(stack)
        grids = [Grid((count, rows, columns))]
        for rank in self.ranks:
            if rank:
                grids.append(Grid((count, rows, rank), columns=Step(columns, rank)))
                grids.append(Grid((count, rank, columns), rows=Step(rows, rank)))
            else:
                grids.append(Grid((count, rows, columns)))
        return tuple(grids)

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if not self.ranks or min(self.ranks) < 0 or self.through not in ("", *CASTABLE):
            raise CoverageError(f"{self.kind}: there are no products of ranks {list(self.ranks)}")
        return super().infer(inputs)

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        most = max(self.ranks)
        return super().scratch(inputs) + 8 * most * (sum(self._block(most)) + sum(self.shape[-2:]))

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import numpy as np

        super().prepare(inputs)
        np.matmul(np.zeros((_HIGH, _LEAST), np.float32), np.zeros((_LEAST, _WIDE), np.float32))

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """See `Boxed.decode`."""
        import numpy as np

        numbers = _numbers(items[0])
        for number in range(len(numbers)):
            product: Array | None = None
            others = iter(items[1:])
            for rank in self.ranks:
                factor = next(others)
                first = _matrix(factor, number)
                other = self._product(first, _matrix(next(others), number), box) if rank else first.astype(np.float32)
                product = other if product is None else np.multiply(product, other, out=product)
            assert product is not None
            np.multiply(product, np.float32(self.scale), out=product)
            numbers[number] += self._rounded(product)
        return numbers, math.inf

    def _rounded(self, product: Array) -> Array:
        if self.through in ("", "float32", "float64"):
            return product
        import numpy as np

        from streamconv.graph.casts import narrow

        rounded = np.empty(product.shape, f"u{DTYPES[self.through].itemsize}")
        narrow(product, rounded, self.through)
        return _numbers(Values(rounded, DTYPES[self.through]))

    @staticmethod
    def _block(rank: int) -> tuple[int, int]:
        """Rows and columns of a product that is made at once."""
        high, wide = _HIGH, _WIDE
        while high * wide * rank > _ALONE and wide > _LEAST:
            wide //= 2
        while high * wide * rank > _ALONE and high > _LEAST:
            high //= 2
        return high, wide

    def _product(self, ups: Array, downs: Array, box: Box) -> Array:
        """A product, of whole blocks of one size with zeros around what there is, in which each element has its place.

        In which order libraries add up depends on the sizes, and on the place.
        """
        import numpy as np

        high, wide = self._block(ups.shape[1])
        rows, tall_size = _places(box.rows, high)
        columns, broad_size = _places(box.columns, wide)
        tall = np.zeros((tall_size, ups.shape[1]), np.float32)
        broad = np.zeros((ups.shape[1], broad_size), np.float32)
        tall[rows], broad[:, columns] = ups, downs
        product = np.empty((len(tall), broad.shape[1]), np.float32)
        for top in range(0, len(tall), high):
            for left in range(0, broad.shape[1], wide):
                down, across = slice(top, top + high), slice(left, left + wide)
                np.matmul(tall[down], broad[:, across], out=product[down, across])
        return product[rows, columns]


def _places(elements: range, size: int) -> tuple[slice, int]:
    """Where elements along an axis are from the block of ``size`` on in which the first is, and the size of the blocks that hold all."""
    first = elements.start % size
    stop = first + elements[-1] + 1 - elements.start
    return slice(first, stop, elements.step), -(-stop // size) * size


@dataclass(frozen=True)
class Kronecker(Boxed):
    """The Kronecker product of two matrices as float32: of each element of the first with all of the second."""

    kind: ClassVar[str] = "kronecker"

    shape: tuple[int, ...]
    second: tuple[int, int]
    dtype: str = "float32"

    @property
    def grids(self) -> tuple[Grid, ...]:
        """See `Boxed.grids`."""
        (rows, columns), (down, across) = self.shape[-2:], self.second
        first = Grid((1, rows // down, columns // across), Step(down), Step(across))
        return first, Grid((1, down, across), Step(rows, down), Step(columns, across))

    @property
    def units(self) -> Sizes:
        """See `Boxed.units`."""
        return 1, 1, 1

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(self.shape) != 2 or min(self.second) < 1 or any(n % k for n, k in zip(self.shape, self.second, strict=True)):
            raise CoverageError(f"{self.kind}: {list(self.shape)} is no Kronecker product of {list(self.second)}")
        return super().infer(inputs)

    def size_of(self, box: Box, items: Sequence[Box]) -> int:  # noqa: ARG002
        """See `Boxed.size_of`."""
        return box.numel

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        return super().scratch(inputs) + 8 * math.prod(self.second)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """See `Boxed.decode`."""
        import numpy as np

        (first,), (second,) = (_numbers(item) for item in items)
        rows, columns = np.array(box.rows), np.array(box.columns)
        down, across = self.second
        above, beside = rows // down - box.rows.start // down, columns // across - box.columns.start // across
        numbers = first[above][:, beside]
        numbers *= second[rows % down][:, columns % across]
        return numbers[None], math.inf


@dataclass(frozen=True)
class ScaleLines(Tuned):
    """A matrix times a number for each of its rows, or for each ``run`` columns.

    Attributes:
        shape: of the matrix.
        dtype: what comes of it.
        run: how many columns share a number; 0: each row has one.
    """

    kind: ClassVar[str] = "scale_lines"

    shape: tuple[int, ...]
    dtype: str
    run: int = 0

    @property
    def grids(self) -> tuple[Grid, ...]:
        """See `Boxed.grids`."""
        rows, columns = self.shape[-2:]
        lines = Grid((1, 1, columns // self.run), Step(rows), Step(self.run)) if self.run else Grid((1, rows, 1), columns=Step(columns))
        return Grid((1, rows, columns)), lines

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(self.shape) != 2 or self.run < 0 or (self.run and self.shape[1] % self.run):
            raise CoverageError(f"{self.kind}: {list(self.shape)} has no lines of {self.run}")
        return super().infer(inputs)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """See `Boxed.decode`."""
        import numpy as np

        numbers, factors = _numbers(items[0]), _numbers(items[1])
        if self.run:
            factors = factors[:, :, np.array(box.columns) // self.run - box.columns.start // self.run]
        return numbers * factors, math.inf


@dataclass(frozen=True)
class Magnify(AddProducts):
    """``m / |V| * V`` of V, which is what `AddProducts` makes of its inputs; m and the norm are of each row, or of each column.

    Of rows the norms are taken on the way. Those of columns are an input (see `ColumnNorms`), the last, after the magnitudes.
    """

    kind: ClassVar[str] = "magnify"

    columns: bool = False

    @property
    def grids(self) -> tuple[Grid, ...]:
        """See `Boxed.grids`: of rows, whose norms it takes, all."""
        rows, columns = self.shape[-2:]
        if self.columns:
            lines = Grid((1, 1, columns), Step(rows))
            return *super().grids, lines, lines
        whole = [replace(grid, columns=Step(columns, columns)) if grid.sizes[2] == columns else grid for grid in super().grids]
        return *whole, Grid((1, rows, 1), columns=Step(columns))

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        if len(self.shape) != 2:
            raise CoverageError(f"{self.kind}: {list(self.shape)} is no matrix")
        return super().infer(inputs)

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`: of rows all, before and after the elements, too; larger regions are cut."""
        bounds = super().reach(numel, inputs)
        if not self.columns:
            columns = self.shape[-1]
            bounds[0] = min(inputs[0].numel, 2 * numel + 2 * columns)
        return bounds

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        return super().scratch(inputs) + 32 * self.shape[-1]

    def size_of(self, box: Box, items: Sequence[Box]) -> int:
        """See `Boxed.size_of`."""
        return max(box.numel, items[0].numel)

    def within(self, numbers: Array, box: Box) -> Array:
        """See `Tuned.within`."""
        columns = box.columns
        return numbers if self.columns else numbers[:, :, columns.start : columns[-1] + 1 : columns.step]

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """See `Boxed.decode`."""
        import numpy as np

        *others, magnitudes = items[:-1] if self.columns else items
        whole = box if self.columns else replace(box, columns=range(self.shape[-1]))
        numbers, _ = super().decode(others, whole)
        if self.columns:
            norms = _numbers(items[-1])
        else:
            norms = np.sqrt(np.square(numbers, dtype=np.float64).sum(axis=-1, keepdims=True)).astype(np.float32)
        numbers = self.within(numbers, box)
        return numbers * (_numbers(magnitudes) / norms), math.inf


@dataclass(frozen=True)
class ColumnNorms(Reduce):
    """The L2 norm of each column of a matrix of float32, as float32."""

    kind: ClassVar[str] = "column_norms"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        (matrix,) = inputs
        if matrix.dtype.name != "float32" or len(matrix.shape) != 2:
            raise CoverageError(f"{self.kind}: takes a matrix of float32, found {matrix}")
        return TensorSpec(matrix.dtype, (matrix.shape[1],))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """Some rows, their squares, what these add up to, and what is to be written."""
        rows, columns = inputs[0].shape
        from streamconv.graph.casts import PIECE

        most = min(rows, max(1, PIECE // columns)) * columns
        return [(most, 4), (most, 8), (columns, 8), (columns, 4)]

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        """See `Reduce.reduce`."""
        import numpy as np

        rows, columns = inputs[0].shape
        raw, squares, sums, out = buffers
        total = sums.view(np.float64)
        total.fill(0)
        step = len(raw) // columns
        for start in range(0, rows, step):
            count = min(step, rows - start)
            part = raw[: count * columns]
            fetch(0, start * columns, part)
            square = squares[: count * columns].view(np.float64)
            np.square(part.view(np.float32), out=square, dtype=np.float64)
            total += square.reshape(count, columns).sum(axis=0)
        np.sqrt(total, out=total)
        out.view(np.float32)[...] = total


def _numbers(values: Values) -> Array:
    """The numbers of some values in memory of their own: float64, else float32."""
    from streamconv.graph.encoders import widened

    if values.dtype.name == "float64":
        return values.numpy().copy()
    return widened(values.items, values.dtype.name)


def _matrix(values: Values, number: int) -> Array:
    """One of a stack of matrices, as numpy has it."""
    matrix: Array = values.numpy()[number]
    return matrix
