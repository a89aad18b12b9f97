"""Low-rank matrices added to the weight that they were trained beside."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move, identity, pull
from streamconv.graph.ops.op import Compute, Values
from streamconv.notation.axes import Axis, Leaf

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_BLOCK = 64  # rows, columns and ranks of a product that are made at once: OpenBLAS shares out larger ones between threads


@dataclass(frozen=True)
class MergeLora(Compute):
    """``W + alpha / rank * B A`` of the inputs W (rows, columns), A (rank, columns) and B (rows, rank), in the dtype of W.

    Summed in float64, so that a tile's shape, which changes the order of additions, does not change what is rounded to that dtype. NaNs as
    those of `Cast`.
    """

    kind: ClassVar[str] = "merge_lora"

    alpha: int
    rows: int
    columns: int
    rank: int

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        shapes = [(self.rows, self.columns), (self.rank, self.columns), (self.rows, self.rank)]
        if self.rank < 1 or [spec.shape for spec in inputs] != shapes or any(spec.dtype.name not in CASTABLE for spec in inputs):
            found = ", ".join(map(str, inputs))
            raise CoverageError(f"low-rank matrices are merged into a matrix of {', '.join(CASTABLE)} that they fit, found {found}")
        return inputs[0]

    def needs(self, region: Move, inputs: Sequence[TensorSpec]) -> list[Move]:  # noqa: ARG002
        return [region, identity(self.rank * self.columns), identity(self.rows * self.rank)]

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:  # noqa: ARG002
        return [numel, self.rank * self.columns, self.rows * self.rank]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:  # noqa: ARG002
        return 6 * 8 * _BLOCK**2

    def prepare(self, inputs: Sequence[TensorSpec]) -> None:  # noqa: ARG002
        import ml_dtypes  # noqa: F401 - loaded before the process is measured
        import numpy as np

        block = np.zeros((_BLOCK, _BLOCK))
        np.matmul(block, block)

    def values(self, region: Move, parts: Sequence[Values], out: Values) -> int:
        weight, down, up = parts[0].items, parts[1].numpy(), parts[2].numpy()
        matrix = Axis("row", self.columns, Axis("column", 1, Leaf(0)))
        factors = down.reshape(self.rank, self.columns), up.reshape(self.rows, self.rank)
        for _, piece, digits in pull(matrix, region):
            self._add(weight, out.dtype.name, piece, digits, *factors)
        out.items[...] = weight
        return 0

    def _add(self, weight: Array, dtype: str, piece: Move, digits: dict[str, tuple[int, tuple[int, ...]]], down: Array, up: Array) -> None:
        """Adds the product to a piece, in blocks whose temporary copies do not count."""
        import numpy as np

        from streamconv.graph.arrays import view
        from streamconv.graph.casts import narrow, widen

        axes = list(zip(piece.sizes, piece.dst_strides, digits["row"][1], digits["column"][1], strict=True))
        tall = max((axis for axis in axes if axis[2]), default=(1, 1, 1, 0))
        wide = max((axis for axis in axes if axis[3]), default=(1, 1, 0, 1))
        others = [axis for axis in axes if axis is not tall and axis is not wide]
        blocks = itertools.product(*(range(n) for n, *_ in others), range(0, tall[0], _BLOCK), range(0, wide[0], _BLOCK))
        for *index, top, left in blocks:
            at, row, column = (
                first + sum(map(int.__mul__, index, (axis[k] for axis in others))) + top * tall[k] + left * wide[k]
                for k, first in ((1, piece.dst), (2, digits["row"][0]), (3, digits["column"][0]))
            )
            height, width = min(_BLOCK, tall[0] - top), min(_BLOCK, wide[0] - left)
            block = view(weight, (height, width), (tall[1], wide[1]), at)
            ups, downs = up[row :: tall[2]][:height], down[:, column :: wide[3]][:, :width]
            total = widen(block, dtype).astype(np.float64)
            for k in range(0, self.rank, _BLOCK):
                product = ups[:, k : k + _BLOCK].astype(np.float64) @ downs[k : k + _BLOCK].astype(np.float64)
                product *= self.alpha / self.rank
                total += product
            narrow(total, block, dtype)
