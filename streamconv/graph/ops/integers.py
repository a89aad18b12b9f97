"""Integers out of the words that they are packed into, and into words: what codes of one library become for another, unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from streamconv.dtypes import DTYPES, TensorSpec
from streamconv.errors import CoverageError
from streamconv.graph.ops.boxes import Box, Boxed, Grid, Step
from streamconv.graph.ops.op import Values
from streamconv.graph.ops.quantized import DequantizeIntegers, stack_of

if TYPE_CHECKING:
    from numpy import ndarray

    Array = ndarray[Any, Any]

_WORD = 32  # bits
_BITS = (4, 8)


@dataclass(frozen=True)
class UnpackIntegers(DequantizeIntegers):
    """Unsigned integers in a byte each, of words that `DequantizeIntegers` would read as codes, or as zero points with ``plus``."""

    kind: ClassVar[str] = "unpack_integers"

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        fits = self.bits in _BITS and self.dtype == "uint8" and len(self.shape) > 1 and not (self.zeros or self.index)
        if not fits or [spec.numel for spec in inputs] != [math.prod(self.grids[0].sizes)]:
            raise CoverageError(f"{self.kind}: {', '.join(map(str, inputs))} are no integers of {self.bits} bits {list(self.shape)}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return (self._lie(Grid(stack_of(self.shape)), self.along),)

    @property
    def per_byte(self) -> int:
        """See `Tabulated.per_byte`: there are no scales."""
        return 0

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:
        import numpy as np

        integers = self._integers(items[0], self.along, Grid(stack_of(self.shape)), box, None, self.plus)
        return integers.astype(np.uint8), math.inf

    def store(self, numbers: Array, target: Array, bound: float) -> int:  # noqa: ARG002
        target[...] = numbers
        return 0


@dataclass(frozen=True)
class PackIntegers(Boxed):
    """Words of unsigned integers, which come in a byte each, along rows (axis 1) or columns (axis 2), the first in the lowest bits.

    Attributes:
        shape: of the words.
        dtype: int32.
        bits: of an integer.
        axis: along which they fill words; the last word may be short.
        matrix: rows and columns of the integers.
    """

    kind: ClassVar[str] = "pack_integers"

    shape: tuple[int, ...]
    dtype: str
    bits: int
    axis: int
    matrix: tuple[int, int]

    def infer(self, inputs: Sequence[TensorSpec]) -> TensorSpec:
        fits = self.bits in _BITS and self.axis in (1, 2) and self.dtype == "int32" and len(self.shape) > 1 and len(inputs) == 1
        if not fits or inputs[0].dtype.name != "uint8" or inputs[0].shape != (*self.shape[:-2], *self.matrix):
            raise CoverageError(f"{self.kind}: {', '.join(map(str, inputs))} are no integers of {self.bits} bits {list(self.matrix)}")
        words = [-(-size // (_WORD // self.bits)) if axis == self.axis else size for axis, size in enumerate(self.matrix, 1)]
        if list(self.shape[-2:]) != words:
            raise CoverageError(f"{self.kind}: {inputs[0]} fills words {words}, not {list(self.shape)}")
        return TensorSpec(DTYPES[self.dtype], self.shape)

    @property
    def grids(self) -> tuple[Grid, ...]:
        per = Step(1, _WORD // self.bits)
        rows, columns = (per, Step()) if self.axis == 1 else (Step(), per)
        return (Grid((math.prod(self.shape[:-2]), *self.matrix), rows, columns),)

    def decode(self, items: Sequence[Values], box: Box) -> tuple[Array, float]:  # noqa: ARG002
        import numpy as np

        from streamconv.graph.encoders import pack

        half = np.uint8(1 << self.bits - 1)  # which packing adds
        return np.stack([pack(matrix - half, self.bits, self.axis - 1) for matrix in items[0].items]), math.inf

    def store(self, numbers: Array, target: Array, bound: float) -> int:  # noqa: ARG002
        target[...] = numbers
        return 0
