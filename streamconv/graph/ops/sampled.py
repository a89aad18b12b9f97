"""New rows of an embedding, drawn like its old ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.ops.op import Fetch, Reduce, as_torch
from streamconv.graph.ops.rounding import settle_nans

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_SUMMED = 1 << 18  # elements of a matrix that are summed at once


@dataclass(frozen=True)
class SampleRows(Reduce):
    """``rows`` new rows of an embedding, drawn from the normal distribution of its old ones with 1e-5 of their covariance.

    With E of V rows and mean mu, ``mu + sqrt(1e-5 / V) * sum_v z_v (E_v - mu)`` with standard normal z has exactly that distribution;
    E is streamed once, no covariance is made, and it may be singular. ``seed`` and ``stream`` choose z. Sums are of float64, in an order
    that shapes alone decide: other processors' matrix products may round their last bits otherwise.
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
        """The input as stored and in float64, z and a row of ones, their products (the last the sum of all rows), the output."""
        spec = inputs[0]
        block, columns = self.block(spec), spec.shape[1]
        wide = [(count, 8) for count in (block * columns, (self.rows + 1) * block, (self.rows + 1) * columns)]
        return [(block * columns, spec.dtype.itemsize), *wide, (self.rows * columns, DTYPES[self.dtype].itemsize)]

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:
        import numpy as np

        spec = inputs[0]
        once = replace(spec, shape=(self.block(spec), spec.shape[1]))
        buffers = [np.zeros(count, f"u{itemsize}") for count, itemsize in self.buffers([once])]
        self.reduce([once], lambda _number, _start, _out: None, buffers)

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np
        import torch

        torch.set_num_threads(1)  # wherever the plan runs: how a product is shared out decides its last bits
        raw, *wide, made = buffers
        values, factors, sums = (as_torch(buffer, DTYPES["float64"]) for buffer in wide)
        spec = inputs[0]
        block, (count, columns) = self.block(spec), spec.shape
        total = sums.view(self.rows + 1, columns).zero_()
        normals = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, self.stream % 2**64]))
        drawn = torch.zeros(self.rows + 1, dtype=torch.float64)
        for start in range(0, count, block):
            n = min(block, count - start)
            fetch(0, start * columns, raw[: n * columns])
            part = values[: n * columns].copy_(as_torch(raw, spec.dtype)[: n * columns]).view(n, columns)
            z = factors[: (self.rows + 1) * n].view(self.rows + 1, n)
            normals.standard_normal(out=z[: self.rows].numpy())
            z[self.rows] = 1
            drawn += z.sum(1)
            total.addmm_(z, part)
        mean = total[self.rows].div_(count)
        new = total[: self.rows].addr_(drawn[: self.rows], mean, alpha=-1).mul_(math.sqrt(1e-5 / count)).add_(mean)
        settle_nans(as_torch(made, DTYPES[self.dtype]).view(self.rows, columns).copy_(new))
