"""New rows of an embedding, drawn like its old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.ops.op import Fetch, Reduce

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_SUMMED = 1 << 18  # elements of a matrix that are summed at once
_PRODUCTS = 1 << 18  # products that one call adds up: OpenBLAS shares out more between threads, which may decide their last bits
_SIDE = 1 << 15  # elements of a matrix that such a call takes or makes


@dataclass(frozen=True)
class SampleRows(Reduce):
    """``rows`` new rows of an embedding, drawn from the normal distribution of its old ones with 1e-5 of their covariance.

    With E of V rows and mean mu, ``mu + sqrt(1e-5 / V) * sum_v z_v (E_v - mu)`` with standard normal z has exactly that distribution;
    E is streamed once, no covariance is made, and it may be singular. ``seed`` and ``stream`` choose z. Sums are of float64, in an order
    that shapes alone decide but within numpy's matrix products: on other processors their last bits may be rounded otherwise.
    """

    kind: ClassVar[str] = "sample_rows"
    MOST: ClassVar[int] = 64  # rows that one op makes: what it keeps of them while it streams is counted

    rows: int
    seed: int
    stream: int
    dtype: str

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        spec = inputs[0]
        if self.rows < 1 or len(spec.shape) != 2 or not spec.numel or not {spec.dtype.name, self.dtype} <= {*CASTABLE}:
            raise CoverageError(f"rows are sampled from matrices of {', '.join(CASTABLE)}, not from {spec}")
        return TensorSpec(DTYPES[self.dtype], (self.rows, spec.shape[1]))

    def block(self, spec: TensorSpec) -> int:
        """Rows of the input that are read at once; they follow from shapes alone, as the order of additions does."""
        return max(1, min(spec.shape[0], _SUMMED // max(spec.shape[1], self.rows + 1)))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """The input as stored and in float64, z and a row of ones, their products (the last the sum of all rows), what makes the output of
        them, and that.
        """
        from streamconv.graph.casts import SCRATCH

        spec = inputs[0]
        block, columns = self.block(spec), spec.shape[1]
        wide = [(count, 8) for count in (block * columns, (self.rows + 1) * block, (self.rows + 1) * columns, max(_SIDE, columns))]
        return [(block * columns, spec.dtype.itemsize), *wide, (SCRATCH, 1), (self.rows * columns, DTYPES[self.dtype].itemsize)]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import numpy as np

        spec = inputs[0]
        once = replace(spec, shape=(self.block(spec), spec.shape[1]))
        buffers = [np.zeros(count, f"u{itemsize}") for count, itemsize in self.buffers([once])]
        self.reduce([once], lambda _number, _start, _out: None, buffers)

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np

        from streamconv.graph.arrays import numpy_dtype
        from streamconv.graph.casts import narrow, pieces

        raw, *wide, _, made = buffers
        values, factors, sums, products = (buffer.view(np.float64) for buffer in wide)
        spec = inputs[0]
        block, (count, columns) = self.block(spec), spec.shape
        total = sums.reshape(self.rows + 1, columns)
        total.fill(0)
        normals = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, self.stream % 2**64]))
        drawn = np.zeros(self.rows + 1)
        for start in range(0, count, block):
            n = min(block, count - start)
            fetch(0, start * columns, raw[: n * columns])
            part = values[: n * columns].reshape(n, columns)
            part[...] = raw[: n * columns].view(numpy_dtype(spec.dtype.name)).reshape(n, columns)
            z = factors[: (self.rows + 1) * n].reshape(self.rows + 1, n)
            normals.standard_normal(out=z[: self.rows])
            z[self.rows] = 1
            drawn += z.sum(1)
            _add_product(z, part, total, products)
        mean = total[self.rows]
        mean /= count
        new = total[: self.rows]
        for k in range(self.rows):
            new[k] -= np.multiply(mean, drawn[k], out=products[:columns])
        new *= math.sqrt(1e-5 / count)
        new += mean
        for rows, out in pieces(new, made.reshape(self.rows, columns)):
            narrow(rows, out, self.dtype)


def _add_product(left: Array, right: Array, total: Array, products: Array) -> None:
    """Adds a product of matrices of float64 to a total, in pieces of so many products that one thread makes each."""
    import numpy as np

    height, depth = left.shape
    deep = min(depth, max(1, _SIDE // height))
    wide = max(1, min(_PRODUCTS // (height * deep), _SIDE // max(height, deep)))
    for top in range(0, depth, deep):
        for start in range(0, right.shape[1], wide):
            part = right[top : top + deep, start : start + wide]
            product = products[: height * part.shape[1]].reshape(height, part.shape[1])
            np.matmul(left[:, top : top + deep], part, out=product)
            total[:, start : start + wide] += product
