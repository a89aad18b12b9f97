"""Weights as codes and scales, by rounding alone: what is stored of a quantized weight is a tensor each, made of the same weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import CASTABLE, DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.moves import Move
from streamconv.graph.ops.boxes import Box, Boxed, Grid, Step
from streamconv.graph.ops.op import Fetch, Reduce, Values

if TYPE_CHECKING:
    from numpy import ndarray

    from streamconv.graph.losses import Loss

    Array = ndarray[Any, Any]

CODES, SCALES, ZEROS = "codes", "scales", "zeros"
"""What of a quantized weight is made."""
_WORD = 32  # bits
_BITS = {"int4": 4, "int4_asymmetric": 4, "nvfp4": 4, "mxfp4": 4}  # of a code, where that is not 8
_PACKED = {"int32": _WORD, "uint8": 8}  # bits of what codes are packed into


@dataclass(frozen=True)
class Quantize(Boxed):
    """The codes of a weight, their scales, or their zero points, of blocks from its first corner on, those at its ends short.

    The inputs are the weight and, for what has one, a scale of all scales.

    Attributes:
        shape: of the output.
        dtype: of the output.
        rule: one of `encoders.ENCODERS`.
        part: which of the three.
        matrix: rows and columns of the weight.
        block: rows and columns that share a scale.
        shared: whether there is a scale of all scales.
    """

    kind: ClassVar[str] = "quantize"
    counts: ClassVar[str] = "unscaled"

    shape: tuple[int, ...]
    dtype: str
    rule: str
    part: str
    matrix: tuple[int, int]
    block: tuple[int, int]
    shared: bool = False

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        from streamconv.graph.encoders import ENCODERS

        weight = inputs[0]
        grids = self.grids if min(self.block) > 0 and min(self.matrix) > 0 else ()
        fits = self.rule in ENCODERS and self.part in (CODES, SCALES, ZEROS) and len(inputs) == len(grids) and len(self.shape) > 1
        if not fits or weight.shape != (*self.shape[:-2], *self.matrix) or weight.dtype.name not in CASTABLE or self.dtype not in DTYPES:
            raise CoverageError(f"{self.kind}: there are no {self.part} by {self.rule!r} of {weight} in blocks of {list(self.block)}")
        if self.shape[-2:] != self._sizes:
            raise CoverageError(f"{self.kind}: {self.part} of {weight} are {list(self._sizes)}, not {list(self.shape)}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    @property
    def _per(self) -> int:
        """How many codes, or zero points, lie in an item of the output."""
        bits = _BITS.get(self.rule, 8)
        return _PACKED.get(self.dtype, bits) // bits

    @property
    def _sizes(self) -> tuple[int, int]:
        rows, columns = self.matrix
        down, across = -(-rows // self.block[0]), -(-columns // self.block[1])
        if self.part == CODES:
            return rows, -(-columns // self._per)
        return (down, across) if self.part == SCALES else (-(-down // self._per), across)

    @property
    def grids(self) -> tuple[Grid, ...]:
        rows, columns = self.matrix
        down, across = min(self.block[0], rows), min(self.block[1], columns)
        if self.part == CODES:
            steps = Step(down, down), Step(-(-across // self._per), across)
        elif self.part == SCALES:
            steps = Step(1, down), Step(1, across)
        else:
            steps = Step(1, down * self._per), Step(1, across)
        weight = Grid((math.prod(self.shape[:-2]), rows, columns), *steps)
        shared = Grid((1, 1, 1), Step(self.shape[-2]), Step(self.shape[-1]))
        return (weight, shared) if self.shared else (weight,)

    def reach(self, numel: int, inputs: Sequence[TensorSpec]) -> list[int]:
        """See `Compute.reach`: what as many elements side by side take, and whole blocks before and after them; large regions are cut."""
        weight = self.grids[0]
        rows, columns = weight.rows, weight.columns
        dense = -(-numel * rows.items * columns.items // (rows.count * columns.count))
        beside = 2 * rows.items * self.matrix[1]
        return [min(inputs[0].numel, 2 * dense + beside, max(_CUT, beside)), *(spec.numel for spec in inputs[1:])]

    def scratch(self, inputs: Sequence[TensorSpec]) -> int:
        return super().scratch(inputs) + 40 * max(0, math.prod(map(min, self.block, self.matrix)) - _LEAST)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        """The items of a box of the output, as they are stored, and of how many values the block has no scale."""
        import numpy as np

        whole = float(items[1].items.view(np.float32).reshape(-1)[0]) if self.shared else 1.0
        matrices = [self._encode(weight, items[0].dtype.name, whole, box) for weight in items[0].items]
        return np.stack([part for part, _ in matrices]), sum(count for _, count in matrices)

    def loss(self, region: Move, parts: Sequence[Values], out: Values) -> Loss | None:  # noqa: ARG002
        """See `Compute.loss`: of codes, what they stand for beside the weight; scales and zero points lose nothing by themselves."""
        if self.part != CODES:
            return None
        import numpy as np

        from streamconv.graph import encoders
        from streamconv.graph.losses import Loss, measure

        total, per = Loss(), self._per
        for _, box, items in self.boxes(region, parts):
            around, dtype = self.grids[0].items_of(box), items[0].dtype.name
            whole = float(items[1].items.view(np.float32).reshape(-1)[0]) if self.shared else 1.0
            rows = slice(box.rows.start - around.rows.start, box.rows[-1] + 1 - around.rows.start)
            columns = slice(box.columns.start * per - around.columns.start, (box.columns[-1] + 1) * per - around.columns.start)
            for weight in items[0].items:
                values = encoders.widened(weight, dtype)
                made = encoders.ENCODERS[self.rule](self._blocks(values.copy()), dtype, whole)
                numbers = encoders.matrix_of(encoders.numbers_of(made, self.rule, dtype, whole), weight.shape)
                total += measure(values[rows, columns], numbers[rows, columns], dtype, self.rule)
        return total

    def _blocks(self, values: Array) -> Array:
        from streamconv.graph import encoders

        return encoders.blocks_of(values, (min(self.block[0], self.matrix[0]), min(self.block[1], self.matrix[1])))

    def _encode(self, weight: Array, dtype: str, whole: float, box: Box) -> tuple[Array, int]:
        """The items of a box, of one matrix, and of how many values, if these are codes, the block has no scale."""
        from streamconv.graph import encoders

        values = encoders.widened(weight, dtype)
        blocks = self._blocks(values)
        made = encoders.ENCODERS[self.rule](blocks, dtype, whole)
        around = self.grids[0].items_of(box)
        if self.part == SCALES:
            return made.scales, 0
        if self.part == ZEROS:
            assert made.zeros is not None
            return encoders.pack(made.zeros, _BITS.get(self.rule, 8), 0), 0
        codes = encoders.matrix_of(made.codes, weight.shape)
        if self._per > 1:
            codes = encoders.pack(codes, _BITS.get(self.rule, 8), 1) if self.dtype == "int32" else encoders.pack_pairs(codes)
        first = box.rows.start - around.rows.start, box.columns.start - around.columns.start // self._per
        rows, columns = (range(start, start + len(axis)) for start, axis in zip(first, (box.rows, box.columns), strict=True))
        unscaled = 0
        if made.unscaled.any():
            masks = encoders.matrix_of(made.unscaled[:, None, :, None].repeat(blocks.shape[1], 1).repeat(blocks.shape[3], 3), weight.shape)
            unscaled = int(masks[rows.start : rows.stop, columns.start * self._per : columns.stop * self._per].sum())
        return codes[rows.start : rows.stop, columns.start : columns.stop], unscaled

    def store(self, numbers: Array, target: Array, bound: float) -> int:
        """See `Boxed.store`; ``bound``: what is counted."""
        target[...] = numbers
        return int(bound)


_CUT = 1 << 22  # elements of a weight that are taken at once, or a row of blocks, if that has more
_LEAST = 1 << 18  # elements of a block that `Boxed.scratch` has counted already


@dataclass(frozen=True)
class SharedScale(Reduce):
    """The scale of all scales of some weights: float32, of the largest magnitude of all of their elements, in the dtype of the first."""

    kind: ClassVar[str] = "shared_scale"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        names = {spec.dtype.name for spec in inputs}
        if len(names) != 1 or not names <= {*CASTABLE}:
            raise CoverageError(f"weights that share a scale must have one floating dtype, not {', '.join(map(str, inputs))}")
        return TensorSpec(DTYPES["float32"], (1,))

    def buffers(self, inputs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
        """A piece of an input, and what is to be written."""
        from streamconv.graph.casts import PIECE, SCRATCH

        most = min(PIECE, max(spec.numel for spec in inputs))
        return [(most, inputs[0].dtype.itemsize), (SCRATCH, 1), (1, 4)]

    def reduce(self, inputs: Sequence[TensorSpec], fetch: Fetch, buffers: Sequence[Array]) -> None:
        import numpy as np

        from streamconv.graph import encoders

        raw, _, made = buffers
        largest = 0.0
        for number, spec in enumerate(inputs):
            for start in range(0, spec.numel, len(raw)):
                part = raw[: min(len(raw), spec.numel - start)]
                fetch(number, start, part)
                values = encoders.widened(part, spec.dtype.name)
                largest = float(np.maximum(largest, np.maximum(values.max(), -values.min())))
        made.view(np.float32)[0] = encoders.shared_scale(largest, inputs[0].dtype.name)


__all__ = ["CODES", "SCALES", "ZEROS", "Quantize", "SharedScale"]
